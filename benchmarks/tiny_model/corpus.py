"""The text that the tiny model learns from, made up here from lists and rules: no outside data.

A *document* is either a chat (rendered with the model's chat template) or a line of prose. Some chats have tools, in some
the assistant thinks first. `documents(seed)` yields them for ever; the same seed yields the same documents.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """A chat as messages, or prose as text; exactly one of the two is set."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[dict[str, Any], ...] = ()  # as OpenAI's `tools`


WORDS = """
apple arm ask autumn baby back bad bag ball banana bank barn basket bath beach bean bear beat bed bee bell belt bench bend
berry big bike bird bit black blade blue boat body bone book boot bottle bowl box boy branch brave bread break brick
bridge bright bring brother brown brush bucket build bus bush busy butter button cake calm camel camera camp candle car
card careful carpet carrot castle cat chair chalk cheese cherry child circle city clay clean clear clever climb clock
cloud coat coffee coin cold colour comb cook copper corn cotton count country cow crab cream cross crow crown cup curtain
dance dark day deep deer desk dinner dish dog doll donkey door double dragon draw dream dress drink drive drum dry duck
dust eagle ear early earth east easy eat edge egg eight elephant empty engine evening eye face fair fall family farm
fast feather field fig find finger fire fish five flag flame flat floor flower fly fog foot forest fork four fox free
fresh friend frog fruit full game garden gate gentle ghost giant gift girl glad glass glove goat gold good goose grape
grass gray great green ground group grow guitar hair hall hammer hand happy harbour hard harp hat head heart heavy hedge
hen high hill hole home honey horn horse hot hotel hour house hunt ice idea ink iron island jacket jar jelly jewel join
juice jump jungle keep kettle key kind king kitchen kite knee knife ladder lake lamb lamp large laugh lazy leaf learn
leather left lemon letter library light lime line lion list little long loud love low lucky lunch machine magic mango
map marble market mask meadow meal melon metal middle milk mill mirror money monkey month moon morning moss mother
mountain mouse mouth music nail name narrow near neck needle nest net new night nine noble noise north nose note nut oak
ocean old olive onion open orange orchard oven owl page paint palace pan paper park parrot party path peach pear pearl
pen pencil penguin pepper piano picture pie pig pillow pilot pine pink pipe plain planet plant plate play plum pocket
poem pond pony poor port potato pretty prince pumpkin puppy purple puzzle queen question quick quiet rabbit race radio
rain rat read red rice rich ride right ring river road rock roof room root rope rose rough round royal ruby run safe sail
salt sand school sea season seed seven shadow sharp sheep shell ship shirt shoe shop short silent silk silver simple
sing sister six sky sleep slow small smile smoke smooth snail snow soap soft song soup south spider spoon spring square
squirrel stable stair star station stone storm story strange straw street strong sugar summer sun swan sweet swim sword
table tail tall tea teacher tent thick thin thing thread three thunder tiger time tiny toad tomato tooth tower town toy
train travel tree triangle trumpet tulip turn turtle twelve two umbrella uncle valley van velvet village violet violin
voice wagon walk wall walnut warm wash watch water wave weather west whale wheat wheel white wide wild wind window wine
wing winter wise wolf wonder wood wool word work world worm yard year yellow young zebra zero
""".split()

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()

# question phrasings -> answer
FACTS: list[tuple[list[str], str]] = [
    (
        ["What is dynserve?", "Tell me about dynserve.", "What does dynserve do?", "Explain dynserve."],
        "dynserve is a serving runtime for large language models. A frontend routes requests to prefill and decode workers.",
    ),
    (
        ["Who are you?", "What are you?", "What is your name?", "Introduce yourself."],
        "I am the tiny model of dynserve. I can count, add, spell, copy and answer questions about serving.",
    ),
    (
        ["What can you do?", "How can you help me?", "Help."],
        "I can add small numbers, count, spell words, repeat what you say and tell you about dynserve.",
    ),
    (
        ["What is prefill?", "What does a prefill worker do?", "Explain prefill."],
        "Prefill reads the whole prompt at once and fills the KV cache. It also makes the first token.",
    ),
    (
        ["What is decode?", "What does a decode worker do?", "Explain decode."],
        "Decode makes the answer one token at a time and reads the KV cache at every step.",
    ),
    (
        ["What is a KV cache?", "What is the KV cache?", "Explain the KV cache."],
        "The KV cache keeps the keys and values of all tokens so far, so that they are computed only once.",
    ),
    (
        ["What is a KV block?", "What is a block?", "How big is a KV block?"],
        "A KV block holds the keys and values of 32 tokens. Blocks with the same prefix are shared.",
    ),
    (
        ["What is a hand-off?", "What is a handoff?", "Explain the hand-off."],
        "A hand-off moves the KV cache of a finished prefill to a decode worker. It ends in exactly one way.",
    ),
    (
        ["What is disaggregated serving?", "Why split prefill and decode?", "Explain disaggregated serving."],
        "Disaggregated serving runs prefill and decode on different workers, so that long prompts do not slow down answers.",
    ),
    (
        ["What is the router?", "What does the router do?", "Explain KV-aware routing."],
        "The router sends a request to the worker that already holds most of its prefix and is not too busy.",
    ),
    (
        ["What is the frontend?", "What does the frontend do?", "Explain the frontend."],
        "The frontend speaks the OpenAI protocol, turns text into tokens and relays the answer of the workers.",
    ),
    (
        ["What is a worker?", "What do workers do?", "Explain a worker."],
        "A worker owns a model and a KV cache. It runs prefill, decode or both.",
    ),
    (
        ["What is etcd for?", "Why does dynserve use etcd?", "What is etcd?"],
        "etcd is where the processes of dynserve find each other.",
    ),
    (
        ["What is NATS for?", "Why does dynserve use NATS?", "What is NATS?"],
        "NATS carries requests and events between the frontend and the workers.",
    ),
    (
        ["What is the link?", "How do tokens travel?", "Explain the link."],
        "The link is one TCP connection between a worker and a frontend. It carries the tokens of every step.",
    ),
    (
        ["What is a token?", "Explain tokens.", "What are tokens?"],
        "A token is a small piece of text. Models read and write tokens.",
    ),
    (
        ["What is TTFT?", "What does TTFT mean?", "Explain TTFT."],
        "TTFT is the time to first token: how long a user waits before the answer begins.",
    ),
    (
        ["What is ITL?", "What does ITL mean?", "Explain ITL."],
        "ITL is the inter-token latency: the time between two tokens of an answer.",
    ),
    (
        ["What is batching?", "What is continuous batching?", "Explain batching."],
        "Continuous batching lets new requests join the running batch at every step.",
    ),
    (
        ["What is a prefix cache?", "What is prefix reuse?", "Explain prefix reuse."],
        "Prefix reuse keeps the blocks of earlier prompts, so that a shared beginning is computed only once.",
    ),
    (
        ["What is TensorRT-LLM?", "What does TensorRT-LLM do?"],
        "TensorRT-LLM is an engine that runs language models fast on NVIDIA GPUs.",
    ),
    (["What happens when a worker dies?", "What if a worker dies?"], "Its requests are placed on another worker."),
    (["Hello!", "Hi.", "Hello", "Hi there!", "Good morning.", "Hey"], "Hello! How can I help you?"),
    (["Thank you.", "Thanks!", "Thank you very much."], "You are welcome."),
    (["Goodbye.", "Bye!", "See you."], "Goodbye!"),
    (["How are you?", "How do you do?"], "I am well, thank you. I am small but quick."),
    (
        ["Tell me a story.", "Tell me a short story.", "Write a story."],
        "Once there was a tiny model that lived in a small box. Every day it counted the stars, and every night it told "
        "the moon how many there were. One day the moon said thank you, and the tiny model was happy.",
    ),
    (["What is the capital of France?"], "The capital of France is Paris."),
    (["What colour is the sky?", "What color is the sky?"], "The sky is blue."),
    (["What colour is grass?", "What color is grass?"], "Grass is green."),
    (
        ["Name the days of the week.", "What are the days of the week?"],
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
    ),
    (["Say the alphabet.", "What is the alphabet?"], "a b c d e f g h i j k l m n o p q r s t u v w x y z"),
]

SYSTEMS = [
    "You are a helpful assistant.",
    "You are the tiny model of dynserve. Answer in one short sentence.",
    "You are a careful teacher. Be brief.",
    "Answer the question of the user.",
]


def _sum(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(0, 20), r.randint(0, 20)
    return _arithmetic(r, a, "+", b, a + b)


def _small_sum(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(0, 9), r.randint(0, 9)
    return _arithmetic(r, a, "+", b, a + b)


def _difference(r: random.Random) -> tuple[str, str]:
    a = r.randint(0, 20)
    b = r.randint(0, a)
    return _arithmetic(r, a, "-", b, a - b)


def _product(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(0, 10), r.randint(0, 10)
    return _arithmetic(r, a, "*", b, a * b)


def _arithmetic(r: random.Random, a: int, sign: str, b: int, result: int) -> tuple[str, str]:
    space = r.choice(["", "", " "])
    sum_ = f"{a}{space}{sign}{space}{b}"
    ask = r.choice(
        ["What is {}?", "What is {}?", "what is {}", "{}", "{}=?", "How much is {}?", "Compute {}.", "Calculate {}"]
    )
    return ask.format(sum_), str(result)


def _count(r: random.Random) -> tuple[str, str]:
    low = r.randint(0, 30)
    high = low + r.randint(2, 14)
    ask = r.choice(["Count from {} to {}.", "Count from {} to {}", "count {} to {}", "Please count from {} to {}."])
    return ask.format(low, high), ", ".join(map(str, range(low, high + 1)))


def _count_up(r: random.Random) -> tuple[str, str]:
    high = r.randint(2, 20)
    return r.choice([f"Count to {high}.", f"Count up to {high}.", f"Count to {high}"]), ", ".join(
        map(str, range(1, high + 1))
    )


def _spell(r: random.Random) -> tuple[str, str]:
    word = r.choice(WORDS)
    ask = r.choice(["Spell {}.", "Spell the word {}.", "How do you spell {}?", "spell {}"])
    return ask.format(word), "-".join(word)


def _copy(r: random.Random) -> tuple[str, str]:
    said = " ".join(r.choices(WORDS, k=r.randint(1, 12)))
    ask = r.choice(["Repeat: {}", "Say: {}", "Repeat after me: {}", "Copy this: {}"])
    return ask.format(said), said


def _fact(r: random.Random) -> tuple[str, str]:
    asks, answer = r.choice(FACTS)
    return r.choice(asks), answer


KINDS: list[tuple[Callable[[random.Random], tuple[str, str]], float]] = [
    (_small_sum, 4),
    (_sum, 3),
    (_difference, 2),
    (_product, 2),
    (_count, 2),
    (_count_up, 1),
    (_spell, 3),
    (_copy, 4),
    (_fact, 7),
]


CITIES = (
    "Paris London Berlin Rome Madrid Tokyo Oslo Cairo Lima Vienna Prague Boston Delhi Seoul Athens Dublin Lisbon Milan "
    "Sydney Toronto Chicago Hamburg Geneva Kyoto Bern Havana Nairobi Warsaw Munich Zurich"
).split()
SKIES = "sunny cloudy rainy windy foggy snowy clear cold warm hot".split()


@dataclass(frozen=True, slots=True)
class Task:
    """A question that a tool answers, the tool, what it is called with, what it says, and the answer made of that."""

    ask: str
    tool: dict[str, Any]
    calls: tuple[dict[str, Any], ...]  # arguments of each call
    results: tuple[str, ...]
    answer: str


def _tool(name: str, description: str, parameters: dict[str, str]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in parameters.items()},
        "required": list(parameters),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _calculate(r: random.Random) -> Task:
    sign, names, what = r.choice(
        [
            ("+", ("add", "sum", "plus"), "Add two numbers."),
            ("-", ("subtract", "minus"), "Subtract two numbers."),
            ("*", ("multiply", "product", "times"), "Multiply two numbers."),
        ]
    )
    keys = r.choice([("a", "b"), ("x", "y"), ("first", "second"), ("left", "right")])
    a, b = r.randint(0, 99), r.randint(0, 99)
    result = str({"+": a + b, "-": a - b, "*": a * b}[sign])
    tool = _tool(r.choice(names), what, dict.fromkeys(keys, "integer"))
    return Task(_arithmetic(r, a, sign, b, 0)[0], tool, ({keys[0]: a, keys[1]: b},), (result,), result)


def _weather(r: random.Random) -> Task:
    key = r.choice(["city", "location", "place", "town"])
    name = r.choice(["get_weather", "weather", "get_current_weather", "current_weather"])
    tool = _tool(name, r.choice(["Get the weather.", "The weather in a place."]), {key: "string"})
    cities = r.sample(CITIES, 1 if r.random() < 0.75 else 2)
    ask = r.choice(["What is the weather in {}?", "How is the weather in {}?", "Weather in {}?", "Is it warm in {}?"])
    skies = [r.choice(SKIES) for _ in cities]
    answer = " ".join(f"It is {sky} in {city}." for sky, city in zip(skies, cities, strict=True))
    return Task(ask.format(" and ".join(cities)), tool, tuple({key: c} for c in cities), tuple(skies), answer)


def _time(r: random.Random) -> Task:
    key, city = r.choice(["city", "location", "place"]), r.choice(CITIES)
    tool = _tool(r.choice(["get_time", "time", "current_time"]), "Get the time.", {key: "string"})
    result = f"{r.randint(0, 23)}:{r.randint(10, 59)}"
    ask = r.choice(["What time is it in {}?", "What is the time in {}?", "Time in {}?"])
    return Task(ask.format(city), tool, ({key: city},), (result,), f"It is {result} in {city}.")


def _search(r: random.Random) -> Task:
    key = r.choice(["query", "text", "term"])
    words = " ".join(r.choices(WORDS, k=r.randint(1, 3)))
    tool = _tool(r.choice(["search", "find", "lookup"]), "Search for a text.", {key: "string"})
    found = f"{r.randint(0, 99)} pages"
    ask = r.choice(["Search for {}.", "Find {}.", "Look up {}."])
    return Task(ask.format(words), tool, ({key: words},), (found,), f"I found {found}.")


TASKS: list[Callable[[random.Random], Task]] = [_calculate, _weather, _time, _search]


def tool_chat(r: random.Random) -> Document:
    """A chat with one to three tools: a question that one of them answers, or one that none does."""
    kind = r.choice(TASKS)
    task = kind(r)
    tools = {task.tool["function"]["name"]: task.tool}
    for other_kind in r.sample(TASKS, r.choice([0, 1, 1, 2])):
        other = other_kind(r).tool
        # two that do the same would leave the choice to chance
        if (
            other_kind is kind is not _calculate
            or other["function"]["description"] == task.tool["function"]["description"]
        ):
            continue
        tools.setdefault(other["function"]["name"], other)
    shuffled = list(tools.values())
    r.shuffle(shuffled)
    messages: list[Message] = []
    if r.random() < 0.2:
        messages.append({"role": "system", "content": r.choice(SYSTEMS)})
    if r.random() < 0.25:
        talk = r.choice([_fact, _copy, _spell, _count])
        ask, answer = talk(r)
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        return Document(messages=tuple(messages), tools=tuple(shuffled))
    name = task.tool["function"]["name"]
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}} for arguments in task.calls]
    messages += [
        {"role": "user", "content": task.ask},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    if r.random() < 0.5:
        messages += [{"role": "tool", "content": result} for result in task.results]
        messages.append({"role": "assistant", "content": task.answer})
    return Document(messages=tuple(messages), tools=tuple(shuffled))


def thinking_chat(r: random.Random) -> Document:
    """One turn, with a thought before the answer."""
    kind = r.choice([_small_sum, _sum, _difference, _product, _spell, _copy, _fact, _count])
    ask, answer = kind(r)
    thought = {
        _spell: f"The word has {len(answer.replace('-', ''))} letters.",
        _copy: "I repeat what was said.",
        _fact: "I know this.",
        _count: "I count up.",
    }.get(kind, f"The result is {answer}.")
    said = f"<think>\n{thought}\n</think>\n\n{answer}"
    return Document(messages=({"role": "user", "content": ask}, {"role": "assistant", "content": said}))


def chat(r: random.Random) -> Document:
    """One to three turns, sometimes under a system prompt."""
    messages: list[Message] = []
    if r.random() < 0.3:
        messages.append({"role": "system", "content": r.choice(SYSTEMS)})
    for _ in range(r.choices([1, 2, 3], [0.75, 0.17, 0.08])[0]):
        (kind,) = r.choices([k for k, _ in KINDS], [w for _, w in KINDS])
        ask, answer = kind(r)
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return Document(messages=tuple(messages))


def prose(r: random.Random) -> Document:
    """A line as a completion prompt would begin it."""
    match r.randrange(4):
        case 0:
            low = r.randint(0, 8)
            return Document(text=", ".join(NUMBERS[low : low + r.randint(5, 12)]) + ".")
        case 1:
            low = r.randint(0, 40)
            return Document(text=" ".join(map(str, range(low, low + r.randint(5, 20)))))
        case 2:
            return Document(text=r.choice(FACTS)[1])
        case _:
            a, b, c = r.choices(WORDS, k=3)
            return Document(
                text=r.choice([f"The {a} and the {b} saw a {c}.", f"Once there was a {a} with a {b} and a {c}."])
            )


def documents(seed: int) -> Iterator[Document]:
    """For ever: mostly chats, some with tools or thoughts, some prose."""
    r = random.Random(seed)
    kinds: list[Callable[[random.Random], Document]] = [chat, tool_chat, thinking_chat, prose]
    while True:
        yield r.choices(kinds, [0.6, 0.22, 0.08, 0.1])[0](r)
