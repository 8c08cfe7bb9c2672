"""`lora_config` from the descriptions of adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynserve.errors import ConfigError
from dynserve.executors.trtllm.lora import MODULES, lora_config


def adapters(tmp_path: Path, **files: dict[str, Any]) -> dict[str, str]:
    for name, content in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(content))
    return {name: str(tmp_path / name) for name in files}


def test_the_loader_of_the_engine_reads_a_single_adapter(tmp_path: Path) -> None:
    found = adapters(tmp_path, one={"r": 16, "target_modules": "all-linear", "modules_to_save": ["lm_head"]})
    assert lora_config(found, None, "here") == {
        "lora_ckpt_source": "hf", "lora_dir": [found["one"]], "max_lora_rank": 16, "max_loras": 1, "max_cpu_loras": 1,
    }  # fmt: skip


def test_several_adapters_share_their_modules_and_the_greatest_rank(tmp_path: Path) -> None:
    found = adapters(
        tmp_path,
        one={"r": 8, "target_modules": ["q_proj", "model.layers.3.mlp.down_proj"], "rank_pattern": {"q_proj": 32}},
        two={"r": 16, "target_modules": ["o_proj", "layers.0.shared_expert.up_proj"], "peft_type": "LORA"},
        three={"target_modules": ["up_proj"]},
    )
    assert lora_config(found, None, "here") == {
        "lora_ckpt_source": "hf",
        # of q, k and v all three or none
        "lora_target_modules": [
            "attn_dense", "attn_k", "attn_q", "attn_v", "mlp_4h_to_h", "mlp_gate", "shared_expert_gate",
        ],
        "max_lora_rank": 32, "max_loras": 3, "max_cpu_loras": 3,
    }  # fmt: skip


def test_every_module_has_one_name(tmp_path: Path) -> None:
    assert len(set(MODULES.values())) == len(MODULES) == 20


def test_what_the_user_gives_wins(tmp_path: Path) -> None:
    found = adapters(tmp_path, one={"r": 8, "target_modules": ["q_proj"]}, two={"r": 4, "target_modules": "a.*pattern"})
    given = {"lora_target_modules": ["attn_q", "attn_k", "attn_v"], "max_lora_rank": 64, "max_cpu_loras": 9}
    made = lora_config(found, given, "here")
    assert made == given | {"lora_ckpt_source": "hf", "max_loras": 2}
    with pytest.raises(ConfigError, match="engine.yaml:3: max_lora_rank: 4 is below the rank of adapter 'one', 8"):
        lora_config(found, {"max_lora_rank": 4, "lora_target_modules": ["attn_q"]}, "engine.yaml:3")


def test_a_null_is_not_given_and_archives_of_nemo_are_left_to_the_engine(tmp_path: Path) -> None:
    found = adapters(tmp_path, one={"r": 16, "target_modules": ["q_proj"]})
    assert lora_config(found, {"max_lora_rank": None}, "here")["max_lora_rank"] == 16
    nemo = {"lora_ckpt_source": "nemo", "lora_dir": ["/models/x.nemo"], "max_lora_rank": 32}
    assert lora_config({"x": "/models/x.nemo"}, nemo, "here") == nemo | {"max_loras": 1, "max_cpu_loras": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"r": 8, "target_modules": ".*_proj"}, "its target_modules is a pattern, '.*_proj': name the modules in the engine"),
        ({"r": 8, "target_modules": ["z_proj"]}, "changes the module 'z_proj', for which TensorRT-LLM has no name"),
        ({"r": 8, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "has its own embed_tokens"),
        ({"r": 0, "target_modules": ["q_proj"]}, r"does not describe a LoRA: ranks \[0\]"),
        ({"r": 8, "peft_type": "IA3"}, "an adapter of type IA3, not LORA"),
        ({"r": 8, "target_modules": 3}, "target_modules 3"),
        ([], "no JSON object"),
        ({"r": 8, "rank_pattern": [1]}, "does not describe a LoRA"),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be_served_beside_others_is_an_error(tmp_path: Path, content: Any, message: str) -> None:
    found = adapters(tmp_path, good={"r": 8, "target_modules": ["q_proj"]}, bad=content)
    with pytest.raises(ConfigError, match=f"adapter 'bad'.*{message}"):
        lora_config(found, None, "here")


def test_a_folder_without_an_adapter_is_an_error_that_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter 'x': .*/adapter_config.json: No such file"):
        lora_config({"x": str(tmp_path)}, None, "here")
