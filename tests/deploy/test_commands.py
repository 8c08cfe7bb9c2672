from __future__ import annotations

import pytest

from dynserve.deploy.commands import Command, find_command, without_triton_patch
from dynserve.errors import ConfigError

WORKER = Command("trtllm", ["--model-path", "m", "--disaggregation-mode", "prefill"])
DIRECT = ["python3", "-m", "dynamo.trtllm", "--model-path", "m", "--disaggregation-mode", "prefill"]


def shell(script: str, **env: str) -> Command | None:
    return find_command(["/bin/bash", "-c", script], env)


@pytest.mark.parametrize(
    "words",
    [
        DIRECT,
        ["/opt/venv/bin/python3.12", *DIRECT[1:]],
        ["sh", "-c", " ".join(DIRECT)],
        ["/bin/sh", "-ec", "exec " + " ".join(DIRECT) + " 2>&1 | tee /tmp/worker.log"],
        ["bash", "-l", "-c", "source /opt/venv/bin/activate && " + " ".join(DIRECT)],
        ["bash", "-c", "A=1 nohup " + " ".join(DIRECT) + " & wait"],
    ],
)
def test_a_command_is_found_in_every_form_that_users_write(words: list[str]) -> None:
    assert find_command(words, {}) == WORKER


def test_a_script_has_comments_conditions_and_continued_lines() -> None:
    script = """
# a comment with a quote: don't
FILE="/opt/a file"
if [ -f "$FILE" ]; then
  sed -i 's/x\\(1\\)/python3 -m dynamo.vllm/g' "$FILE"   # not a command
fi
exec python3 -m dynamo.trtllm \\
  --model-path m \\
  --disaggregation-mode prefill  # the role
"""
    assert shell(script) == WORKER


def test_arguments_keep_their_quoted_text() -> None:
    found = shell("""python3 -m dynamo.vllm --kv-transfer-config '{"a": [1, "x;y"]}' --model "a b"c""")
    assert found == Command("vllm", ["--kv-transfer-config", '{"a": [1, "x;y"]}', "--model", "a bc"])


def test_variables_are_replaced_as_a_shell_or_kubernetes_does() -> None:
    found = shell('python3 -m dynamo.vllm --model "$MODEL" --x ${A:-1} --y ${B}', MODEL="m", B="2")
    assert found == Command("vllm", ["--model", "m", "--x", "1", "--y", "2"])
    direct = find_command(["python3", "-m", "dynamo.vllm", "--model", "$(MODEL)", "$(OTHER)"], {"MODEL": "m"})
    assert direct == Command("vllm", ["--model", "m", "$(OTHER)"])


def test_a_command_without_dynamo_is_none() -> None:
    assert find_command([], {}) is None
    assert find_command(["sleep", "3"], {}) is None
    assert shell("echo python3 -m other.dynamo.trtllm") is None


def test_two_different_modules_in_one_command_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dynamo.vllm and dynamo.trtllm"):
        shell("python3 -m dynamo.vllm & python3 -m dynamo.trtllm")
    assert shell("python3 -m dynamo.vllm || python3 -m dynamo.vllm") == Command("vllm", [])


def test_an_open_quote_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no closing quotation"):
        shell("python3 -m dynamo.vllm --model 'm")


PATCH = """set -x
# Patch Triton Unicode bug
TRITON_DRIVER="/opt/venv/lib/python3.12/site-packages/triton/backends/nvidia/driver.py"
if [ -f "$TRITON_DRIVER" ]; then
  sed -i 's/a/b/g' "$TRITON_DRIVER"
fi

# Start prefill worker
exec python3 -m dynamo.trtllm --model-path m
"""


def test_the_guides_patch_of_triton_is_left_out_and_nothing_else() -> None:
    assert (
        without_triton_patch(PATCH) == "set -x\n# Start prefill worker\nexec python3 -m dynamo.trtllm --model-path m\n"
    )
    for other in ("X=1\nif [ -f $X ]; then\n  echo x\nfi\nexec y\n", PATCH.replace("fi\n", "done\n")):
        assert without_triton_patch(other) == other
