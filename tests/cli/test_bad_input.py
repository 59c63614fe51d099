"""Bad input: one clear line, the right exit code, nothing left behind. The tables are the promise (docs/errors.md)."""

import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sandbox import Maveriq, everything_in, put
from testbeds import RUN, recorded_files

from maveriq.embedded import data_path
from maveriq.report import runfiles
from maveriq.report.reading import read_run

SCHEDULE = "arrival_s,endpoint,prompt_tokens,output_tokens\n"
TWO_REQUESTS = SCHEDULE + "100,1,10,20\n200,1,10,20\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:03,1,2\n"
CLUSTER = 'name = "mine"\ngpu = "A6000"\ncount = 2\n'
TINY_CLUSTER = CLUSTER + "memory_gib = 1\n"
MODELS = 'name = "mine"\n[[models]]\nmodel = "llama-2-7b"\nload_at = 0\n'
CONFIG = (
    '{"_name_or_path": "llama-2-7b", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,'
    ' "vocab_size": 32000}'
)


MEASURED = {
    "t.csv": "model,tp,pp,layer_split,weight_dtype,int8_kv,output_tokens,batch_size,latency_s,memory_after_run_gib,"
    "prompt_tokens\nllama-2-7b,1,1,32,float16,0,10,1,0.5,14,923\n"
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line, the files it finds, and words that its one line must have."""

    command: str
    words: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)


def bad(command: str, *words: str, files: Mapping[str, str | bytes] | None = None) -> Case:
    return Case(command=command, words=words, files=files or {})


def cluster(text: str, *words: str) -> Case:
    return bad("plan llama-2-7b --gpus c.toml", "c.toml", *words, files={"c.toml": text})


def models(text: str, *words: str, more: str = "") -> Case:
    return bad(f"trace show --models m.toml {more}", *words, files={"m.toml": text, "x/config.json": CONFIG})


def trace(content: str | bytes, *words: str, name: str = "t.csv") -> Case:
    return bad(f"trace check {name}", name, *words, files={name: content})


def config(text: str, *words: str) -> Case:
    return bad("plan x/config.json", *words, files={"x/config.json": text})


def profile(table: str, old: str, new: str, *words: str) -> Case:
    """Use a copy of the A6000's files in which one thing is spoilt."""
    files = {f"p/{path.name}": path.read_text() for path in data_path("a6000").iterdir()}
    spoilt = re.sub(old, new, files[f"p/{table}"], count=1)
    assert spoilt != files[f"p/{table}"]
    return bad("plan llama-2-7b --profile p/profile-short.toml", *words, files=files | {f"p/{table}": spoilt})


def policy(text: str, *words: str, rule: str = "r.py:order") -> Case:
    return bad(f"sim --policy {rule}", *words, files={"r.py": text, "t.csv": TWO_REQUESTS})


def recorded(command: str, *words: str, name: str = RUN, **changed: tuple[str, str]) -> Case:
    """Use a small testbed in which one thing is spoilt."""
    files = {f"tb/{name}": content for name, content in recorded_files(**changed).items()}
    return bad(f"testbed {command} {name} --data tb --out runs", *words, files=files)


MALFORMED = [
    # The command line itself
    bad("simulate", "no such command 'simulate'", "see maveriq --help"),
    bad("trace sho", "no such command 'sho'", "did you mean 'show'", "see maveriq trace --help"),
    bad("--colour", "no such option: --colour", "see maveriq --help"),
    bad("sim --packing-treshold 1", "no such option", "--packing-threshold", "see maveriq sim --help"),
    bad("sim stray", "unexpected extra argument", "stray"),
    bad("sim --seed", "'--seed' requires an argument"),
    bad("sim --scale abc", "'--scale'", "number", "'abc'", "see maveriq sim --help"),
    bad("sim --seed 1.5", "'--seed'", "integer", "'1.5'"),
    bad("sim --batch-size ''", "'--batch-size'", "integer"),
    bad("plan", "missing argument 'MODEL'", "see maveriq plan --help"),
    bad("plan llama-2-7b --top 0", "'--top'", "greater than or equal to 1", "'0'"),
    bad("fit", "give --evaluate TABLE", "or a folder DATA"),
    bad("trace export", "missing option '--out'"),
    bad("trace check", "missing argument 'FILE'"),
    # Numbers
    bad("sim --scale 0", "scale must be a positive number, not 0"),
    bad("sim --scale -1", "scale must be a positive number, not -1"),
    bad("sim --scale nan", "--scale must be a finite number, not nan"),
    bad("sim --scale inf", "--scale must be a finite number, not inf"),
    bad("sim --scale 1e12", "scale 1e+12", "requests", "give a lower scale"),
    bad("sim --scale 1e-300", "no request arrives", "raise the scale"),
    bad("trace show poisson --scale 1e12", "give a lower scale"),
    bad("trace show --scale nan", "--scale must be a finite number, not nan"),
    bad("sim --remove endpoint=9@900s", "removal of endpoint 9", "endpoints 1 to 4"),
    bad("sim --remove gpu=1@900s", "cannot read the removal 'gpu=1@900s'", "write endpoint=2@900s"),
    bad("sim --remove endpoint=2@1s", "it is not asked for before 270 s"),
    bad("sim --fail deployment=2@1s", "fault of deployment 2 at 1 s", "not asked for before 270 s"),
    bad("sim --fail gpu=1@99999s", "fault of GPU 1 at 99999 s", "the run ends by"),
    bad("sim --replica random", "unknown replica choice 'random'", "uniform"),
    bad("sim --policy alpaserve --float16-only", "--float16-only applies to policies that go by intents"),
    bad("sim --alpaserve-profile published", "--alpaserve-profile applies to alpaserve and alpaserve-star"),
    bad("sim --packing-threshold 1.5", "packing threshold must lie between 0 and 1, not 1.5"),
    bad("sim --packing-threshold -0.1", "packing threshold must lie between 0 and 1, not -0.1"),
    bad("sim --packing-threshold nan", "--packing-threshold", "not nan"),
    bad("sim --policy llf --packing-threshold 2", "packing threshold must lie between 0 and 1, not 2"),
    bad("sim --min-accuracy 101", "accuracy must lie between 0 and 100 percent, not 101"),
    bad("plan llama-2-7b --min-accuracy nan", "accuracy must lie between 0 and 100 percent, not nan"),
    bad("sim --slo-scale -1", "--slo-scale must be at least 0, not -1"),
    bad("sim --slo-scale 1e300", "--slo-scale must be at most 1,000,000, not 1e+300"),
    bad("sim --batch-size 0", "--batch-size must be at least 1, not 0"),
    bad(f"sim --batch-size 1{'0' * 30}", "--batch-size must be at most 10,000"),
    bad("sim --seed -1", "seed must lie between 0 and 4294967295, not -1"),
    bad(f"trace show --seed 1{'0' * 30}", "seed must lie between 0 and 4294967295"),
    bad("sim --tick-ms -1", "--tick-ms must be at least 0, not -1"),
    bad("sim --load-s inf", "--load-s must be a finite number"),
    bad("sim --load-s -3", "--load-s must be at least 0"),
    bad("sim --max-wait-s -1", "--max-wait-s must be at least 0"),
    bad("sim --drain-s 1e300", "--drain-s must be at most 1,000,000,000"),
    bad("sim --slo-ttft-ms 0", "--slo-ttft-ms must be a positive number of milliseconds, not 0"),
    bad("sim --slo-tpot-ms nan", "--slo-tpot-ms must be a positive number of milliseconds, not nan"),
    bad("sim --prompt-tokens x", "prompt tokens must be sharegpt, trace or a whole number", "'x'"),
    bad("sim --prompt-tokens -5", "prompt tokens must be", "'-5'"),
    bad("sim --output-tokens 0", "output tokens must be trace or a whole number from 1", "'0'"),
    bad("sim --output-tokens 1000000000000", "output tokens must be", "'1000000000000'"),
    bad("plan llama-2-7b --output-tokens 0", "'--output-tokens'", "greater than or equal to 1"),
    bad("plan llama-2-7b --output-tokens 1000000000000", "'--output-tokens'", "less than or equal to 10000000"),
    bad("plan llama-2-7b --prompt-tokens x", "'--prompt-tokens'", "integer", "'x'"),
    bad("plan llama-2-7b --batch-size 0", "'--batch-size'", "greater than or equal to 1"),
    bad("plan llama-2-7b --slo-ms -5", "SLO must be a positive number of seconds, not -0.005"),
    bad("plan llama-2-7b --slo-ms nan", "SLO must be a positive number of seconds, not nan"),
    # Names
    bad("sim --trace cod", "unknown trace 'cod'", "did you mean 'code'?", "poisson"),
    bad("sim --models larg", "unknown model set 'larg'", "did you mean 'large'?", "TOML"),
    bad("plan llama-2-7", "unknown model 'llama-2-7'", "did you mean 'llama-2-7b'?", "config.json"),
    bad("plan llama-2-7b --gpus 8xA600", "unknown kind of GPU 'A600'", "did you mean 'A6000'?"),
    bad("plan llama-2-7b --profile a6000-shrt", "unknown profile 'a6000-shrt'", "did you mean 'a6000-short'?"),
    bad("sim --policy hybri", "unknown policy 'hybri'", "did you mean 'hybrid'?", "file.py:function"),
    bad("sim --intent min-cots", "unknown intent 'min-cots'", "did you mean 'min-cost'?"),
    bad("sim --queue fif", "unknown queue 'fif'", "did you mean 'fifo'?"),
    bad("sim --on-failure requeu", "unknown --on-failure 'requeu'", "did you mean 'requeue'?"),
    bad("sim --plan-with papr", "unknown estimator 'papr'", "did you mean 'paper'?"),
    bad("sim --serve-with recordd", "unknown estimator 'recordd'", "did you mean 'recorded'?"),
    bad(f"plan {'a' * 300}", "unknown model", "known: "),
    bad(f"sim --trace {'a' * 300}", "unknown trace", "known: "),
    # Options that do not go together
    bad("sim --serve-with recorded", "no recorded service times", "service_s column"),
    bad("sim --trace t.csv --scale 1", "replayed as it was recorded", files={"t.csv": TWO_REQUESTS}),
    bad("sim --poisson-as-published", "applies to the trace 'poisson'", "leave it out"),
    bad("trace show poisson --prompt-tokens trace", "has no lengths of its own", "give a number"),
    bad("trace show t.csv", "endpoint 9", "has 4 models", files={"t.csv": SCHEDULE + "1,9,1,1\n"}),
    bad("trace show t.csv", "loads at bin 15, but the last bin of the trace is 0", files={"t.csv": AZURE}),
    # Faults
    bad("sim --fail gpu", "cannot read the fault 'gpu'", "gpu=3@600s,for=120s"),
    bad("sim --fail gpu=3", "cannot read the fault 'gpu=3'"),
    bad("sim --fail gpu=3@-5s", "cannot read the fault"),
    bad("sim --fail gpu=3@nan", "cannot read the fault"),
    bad("sim --fail gpu=99@5s", "fault of GPU 99", "GPUs 0 to 7"),
    bad("sim --fail deployment=9@5s", "fault of deployment 9", "deployments 1 to 4"),
    # Traces and schedules
    bad("trace check nowhere.csv", "trace 'nowhere.csv' does not exist", "check the path"),
    bad("sim --trace ./nowhere", "trace 'nowhere' does not exist"),
    bad("trace check folder", "trace 'folder' is a folder", files={"folder/": ""}),
    bad(f"trace check {'a' * 300}.csv", "cannot be read", "File name too long"),
    trace("", "is empty"),
    trace("\n\n", "is empty"),
    trace(b"\xff\xfe\x00\x01", "not a text file in UTF-8"),
    trace(b"no gzip", "cannot be read", "give another file", name="t.csv.gz"),
    trace(b"\x1f\x8b\x08\0\0\0\0\0\0\3" + bytes(range(100, 200)), "cannot be read", name="t.csv.gz"),
    trace("a,b\n1,2\n", "neither an Azure trace", "nor a schedule", "arrival_s"),
    trace(SCHEDULE, "header but no row"),
    trace("arrival_s,endpoint,prompt_tokens\n1,1,1\n", "no column output_tokens"),
    trace("arrival_s,endpoint,prompt_tokens,output_tokens,colour\n1,1,1,1,1\n", "unknown column colour"),
    trace(SCHEDULE + "1,1,1,1\n2,1,1,x\n", "line 3: output_tokens must be a number, not 'x'"),
    trace(SCHEDULE + "1,1,1,1\n2,1,1,1,1\n", "line 3: 5 cells where the header has 4"),
    trace(SCHEDULE + "1,1,1,1\n2,1,1\n", "line 3: 3 cells"),
    trace(SCHEDULE + "2,1,1,1\n1,1,1,1\n", "line 3", "before 2", "sort by time"),
    trace(SCHEDULE + "1,1,-1,1\n", "line 2: prompt_tokens", "from 1", "'-1'"),
    trace(SCHEDULE + "1,1,1.5,1\n", "line 2: prompt_tokens must be a whole number"),
    trace(SCHEDULE + "nan,1,1,1\n", "line 2: arrival_s must be a finite number"),
    trace(SCHEDULE + "1,inf,1,1\n", "line 2: endpoint must be a finite number"),
    trace(SCHEDULE + "1e300,1,1,1\n", "line 2: arrival_s must be at most 1e+09"),
    trace(SCHEDULE + '1,"1,1,1\n', "not a valid CSV file"),
    trace(AZURE + "2023-11-16 18:00:02,1,2\n", "line 3", "before that of the row above", "sort"),
    trace(AZURE + "yesterday,1,2\n", "line 3: TIMESTAMP must look like 2023-11-16", "'yesterday'"),
    trace(AZURE + "2023-13-16 18:00:02,1,2\n", "line 3: TIMESTAMP must look like"),
    trace(AZURE + "2255-11-16 18:00:02,1,2\n", "spans more than 1,000,000 minutes", "is a year wrong?"),
    trace(AZURE + "2023-11-16 18:00:05,-1,2\n", "line 3: ContextTokens", "'-1'"),
    # Clusters
    bad("plan llama-2-7b --gpus 0xA6000", "GPUs '0xA6000'", "between 1 and 10000"),
    bad("plan llama-2-7b --gpus 999999999xA6000", "between 1 and 10000"),
    bad("plan llama-2-7b --gpus 8x", "GPUs '8x'", "such as 8xA6000"),
    bad("plan llama-2-7b --gpus 8xH999", "unknown kind of GPU 'H999'", "known: A6000"),
    bad("plan llama-2-7b --gpus c.toml", "cluster 'c.toml' does not exist"),
    cluster("name = \n", "not valid TOML", "line 1"),
    cluster(CLUSTER + "memry_gib = 40\n", "unknown key `memry_gib`"),
    cluster('name = "mine"\ngpu = "A6000"\n', "missing key `count`"),
    cluster('name = "mine"\ngpu = "A6000"\ncount = "two"\n', "count must be a whole number, not a text"),
    cluster('name = "mine"\ngpu = "A6000"\ncount = 0\n', "count must be a whole number of at least 1"),
    cluster(CLUSTER + "used_gib = [1]\n", "used_gib has 1 numbers for 2 GPUs", "give one for each"),
    cluster(CLUSTER + "used_gib = [1, 99]\n", "GPU 1 (A6000)", "more than", "lower used_gib"),
    cluster(CLUSTER + "memory_gib = nan\n", "memory_gib must be a number"),
    cluster(CLUSTER + "memory_gib = inf\n", "memory_gib must be a number"),
    cluster(CLUSTER + f"memory_gib = {'9' * 400}\n", "memory_gib is too long a number"),
    cluster(CLUSTER + f"memory_gib = {'9' * 5000}\n", "a number is too long"),
    cluster("a = " + "[" * 5000, "brackets too deep"),
    # Model sets
    bad("trace show --models m.toml", "model set 'm.toml' does not exist"),
    models('name = "mine"\nmodels = []\n', "m.toml", "models must be a list of length at least 1"),
    models(MODELS + "colour = 1\n", "unknown key `colour` (in models[0])"),
    models(MODELS.replace("llama-2-7b", "llama-7b"), "m.toml", "unknown model 'llama-7b'", "'llama-2-7b'?"),
    models(MODELS.replace("load_at = 0", "load_at = 3"), "the first model must load at bin 0"),
    models(
        MODELS.replace("load_at = 0", "load_at = -1"),
        "m.toml",
        "models[0].load_at must be a whole number of at least 0",
    ),
    models(MODELS.replace("load_at = 0", "load_at = nan"), "m.toml", "must be a whole number, not a fraction"),
    models(
        MODELS.replace("load_at = 0", "load_at = 5") + '[[models]]\nmodel = "gptj-6b"\nload_at = 0\n',
        "gptj-6b loads at bin 0, after a model that loads at bin 5",
        "list the models by load_at",
    ),
    models(MODELS + 'objective = "min-money"\n', "m.toml", "unknown objective 'min-money'"),
    models(MODELS + "min_accuracy = 120\n", "m.toml", "models[0].min_accuracy must be a number of at most 100"),
    models(MODELS.replace("llama-2-7b", "y/config.json"), "y/config.json", "does not exist"),
    bad(
        "sim --models m.toml --slo-scale 5",
        "model 'own' has no measured latency to scale an SLO from",
        "give SLO scale 0",
        files={
            "m.toml": MODELS.replace("llama-2-7b", "own/config.json"),
            "own/config.json": CONFIG.replace("llama-2-7b", "own"),
        },
    ),
    # Models
    bad("plan x/config.json", "model configuration 'x/config.json' does not exist"),
    bad("plan x", "model configuration 'x/config.json' does not exist", files={"x/": ""}),
    config("{", "not valid JSON"),
    config("[]", "must hold a JSON object, not list"),
    config("[" * 100_000, "not valid JSON"),
    config("{}", "no num_hidden_layers", "decoder-only"),
    config(CONFIG.replace(": 32,", ": -1,"), "layers must be a positive whole number", "not -1"),
    config(CONFIG.replace(": 32,", ": 1.5,"), "layers must be a positive whole number", "not 1.5"),
    config(CONFIG.replace("llama-2-7b", "own"), "model 'own' has no fingerprint in profile 'a6000-short'", "--profile"),
    # Profiles
    bad("plan llama-2-7b --profile p.toml", "profile 'p.toml' does not exist"),
    profile("profile-short.toml", "prompt_tokens", "tokens", "profile-short.toml", "key"),
    profile("profile-short.toml", 'hardware = ".*"', r'hardware = "a\\u0000b"', "cannot be read", "null byte"),
    profile("hardware.toml", "kind = .*", 'kind = "H999"', "measured on H999", "A6000", "--profile FILE"),
    profile("hardware.toml", r'"slo.csv"', '"sloo.csv"', "sloo.csv' does not exist"),
    profile(
        "hardware.toml",
        "tick_ms = .*",
        "tick_ms = nan",
        "hardware.toml",
        "dispatch.tick_ms must be a number of at least 0",
    ),
    profile("slo.csv", r"\nllama-2-7b,[^,]*", r"\nllama-2-7b,-1", "slo.csv", "ttft_s", "from 0 to 1e+06, not '-1'"),
    profile("slo.csv", r"\nllama-2-7b", r"\nllama-7b", "unknown model 'llama-7b'", "did you mean 'llama-2-7b'?"),
    profile("fingerprints-short.csv", r"float16", "float8", "line 2: weights must be one of", "'float8'"),
    profile("fingerprints-short.csv", r"(1,1,1,.*),[^,]*,[^,]*\r?\n", r"\1,0,0\n", "line 2: memory_layer_gib"),
    profile("fingerprints-short.csv", "1,1,1,[^,]*", "1,1,1,1e308", "line 2: ttft_layer_s", "to 1e+06, not '1e308'"),
    profile("exponents.csv", r"(\d\.\d+)", "nan", "exponents.csv", "must be a finite number", "'nan'"),
    profile("unsupported.csv", r"\n(.*)\n", r"\n\1\n\1\n", "unsupported.csv", "says again", "remove one"),
    # Policies of one's own
    bad("sim --policy r.py:order", "policy 'r.py:order'", "cannot be imported", "No such file"),
    bad("sim --policy nosuchmodule:order", "cannot be imported", "No module named 'nosuchmodule'"),
    bad("sim --policy .x:order", "policy '.x:order'", "cannot be imported"),
    bad("sim --policy :order", "policy ':order'", "cannot be imported"),
    policy("def order(gpus) return", "cannot be imported", "SyntaxError"),
    policy("1 / 0", "cannot be imported", "ZeroDivisionError: division by zero (r.py, line 1)"),
    policy("import sys\nsys.exit()", "cannot be imported", "SystemExit"),
    policy("", "r.py has no function 'order'"),
    policy("order = 3", "r.py has no function 'order'"),
    # Where results go
    bad("sim --out f", "is a file", "name a folder", files={"f": ""}),
    bad("sim --out f/x", "which is a file", files={"f": ""}),
    bad("sim --out d", "holds files that are no run (notes.txt, ...)", files={"d/notes.txt": ""}),
    bad("sim --out /proc/run", "cannot be written", "name another place"),
    bad("sim --out ~nobody-of-this-name/x", "leads nowhere", "name another folder"),
    bad("trace export --out d", "is a folder; name a file", files={"d/": ""}),
    bad("trace export --out nowhere/s.csv", "cannot be written: No such file or directory"),
    bad(f"trace export --out {'a' * 300}", "cannot be written: File name too long"),
    # Tables of measurements
    bad("fit . --evaluate t.csv", "not both", files={"t.csv": TWO_REQUESTS}),
    bad("fit .", "data folder '.' has no table of measurements with a column prompt_tokens"),
    bad("fit . --leave-out gptj-6b", "belong to --evaluate"),
    bad("fit --evaluate t.csv --out .", "--out and --runs belong to a fit", files={"t.csv": TWO_REQUESTS}),
    bad("fit --evaluate t.csv --runs .", "--out and --runs belong to a fit", files={"t.csv": TWO_REQUESTS}),
    bad("fit t.csv --out nowhere", "--out 'nowhere' is no folder; make it first", files=MEASURED),
    bad("fit t.csv --runs d", "--runs 'd' holds no run folder", files={**MEASURED, "d/": ""}),
    bad("fit t.csv", "llama-2-7b is the only model measured", files=MEASURED),
    bad("fit nowhere.csv", "table of measurements 'nowhere.csv' does not exist"),
    bad("fit --evaluate t.csv --estimator paper --leave-out gptj-6b", "only the calibrated estimator"),
    bad("fit . --profile a6000-long", "belong to --evaluate"),
    bad("fit --evaluate t.csv --prompt-tokens 9", "column prompt_tokens; leave --prompt-tokens away", files=MEASURED),
    bad(
        "fit --evaluate t.csv",
        "line 2: prompt_tokens must be a whole number of at least 1, not '0'",
        files={"t.csv": MEASURED["t.csv"].replace(",923", ",0")},
    ),
    bad("fit --evaluate t.csv --estimator guess", "unknown estimator 'guess'", files={"t.csv": TWO_REQUESTS}),
    bad(
        "sim --serve-without MaverIQ_large_min_lat",
        "unknown recorded run 'MaverIQ_large_min_lat'",
        "did you mean",
        "MaverIQ_large",
    ),
    bad("sim --serve-without x --serve-with paper", "applies to --serve-with calibrated, not to 'paper'"),
    bad("fit --evaluate nowhere.csv", "table of measurements 'nowhere.csv' does not exist"),
    bad("fit --evaluate t.csv", "no column model, tp", files={"t.csv": TWO_REQUESTS}),
    bad("fit --evaluate t.csv", "is empty; it needs a header with model, tp", files={"t.csv": ""}),
    bad(
        "fit --evaluate t.csv",
        "line 2: latency_s must be a finite number",
        "'nan'",
        files={
            "t.csv": "model,tp,pp,layer_split,weight_dtype,int8_kv,output_tokens,batch_size,latency_s,"
            "memory_after_run_gib\nllama-2-7b,1,1,32,float16,0,10,1,nan,14\n"
        },
    ),
    # Comparisons
    bad("compare", "missing argument 'SIM'", "see maveriq compare --help"),
    bad("compare a", "missing argument 'REAL'"),
    bad("compare a b --data nowhere", "holds no recordings"),
    bad("compare f d", "'f/run.json' cannot be read", "not a directory", files={"f": "x", "d/": ""}),
    bad("compare d d", "run file 'd/run.json' does not exist", files={"d/": ""}),
    bad("compare d d", "is not what maveriq writes", files={"d/run.json": "{}"}),
    bad("compare d d --plot a.jpg", "plot 'a.jpg' must end in .png or .svg", files={"d/": ""}),
    bad("compare d d --tolerance mean", "name=limit", "mean=10%", "'mean'", files={"d/": ""}),
    bad("compare d d --tolerance ''", "name=limit", files={"d/": ""}),
    bad("compare d d --tolerance mena=1%", "unknown tolerance 'mena'", "did you mean 'mean'?", files={"d/": ""}),
    bad("compare d d --tolerance slo=3%", "tolerance on slo must be in pt, not in %", files={"d/": ""}),
    bad("compare d d --tolerance mean=-1", "must be a number from 0 with %, not '-1'", files={"d/": ""}),
    bad("compare d d --tolerance mean=nan", "must be a number from 0 with %, not 'nan'", files={"d/": ""}),
    bad("compare d d --tolerance mean=1,mean=2", "tolerance on mean stands twice", files={"d/": ""}),
    # Recorded runs
    bad("testbed importt", "no such command 'importt'", "see maveriq testbed --help"),
    bad("testbed import", "missing option '--out'"),
    bad("testbed import --out runs", "name the recorded runs, or give --all"),
    bad("testbed replay x --all --out runs", "not both"),
    bad("testbed import x --out runs --data nowhere", "'nowhere' holds no recordings", "testbed/runs.csv"),
    recorded("import", "unknown recorded run 'MaverIQ_tin'", f"did you mean '{RUN}'?", name="MaverIQ_tin"),
    recorded("import", "line 2: rate_scale must be a number, not 'lots'", runs=("code,0.1", "code,lots")),
    recorded("import", "line 4: latency_s must be a finite number", "'-1'", completed=("0.91", "-1")),
    recorded("replay", "line 2: service_s must be a finite number", "'0'", completed=("1.49", "0")),
    recorded("import", "line 3: scheduled_s must be a finite number", "1e300", scheduled=("330.0", "1e300")),
    recorded("import", "no column prompt_chars", scheduled=("prompt_chars", "chars")),
    recorded("import", "line 2: gpus must be numbers from 0 to 7, not '3 0 1 9'", deployments=("3 0 1 2", "3 0 1 9")),
    recorded("import", "layer split", "must add up to 60 layers", deployments=("32 28", "32 27")),
    recorded("replay", "completed by model 3 but scheduled for 2", completed=("1,2,330", "1,3,330")),
    recorded("import", "unknown policy of a recorded run 'magic'", runs=("MaverIQ,", "magic,")),
    recorded("import", "unknown model set 'huge'", runs=("large", "huge")),
]


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.command[:60])
def test_bad_input_gives_one_line_and_2_and_leaves_nothing(case: Case, maveriq: Maveriq, tmp_path: Path) -> None:
    put(tmp_path, case.files)
    before = everything_in(tmp_path)
    ended = maveriq(case.command)
    line = ended.only_line
    assert [word for word in case.words if word.lower() not in line.lower()] == [], line
    assert ended.code == 2
    assert everything_in(tmp_path) == before
    assert len(line) < 1000


SLOW = "plan llama-2-7b --slo-ms 1"
RULE = "def order(gpus):\n    "
FAILING = [
    bad(SLOW, "llama-2-7b: misses its SLO of 0.001 s", "the fastest that fits takes", "--why"),
    bad(f"{SLOW} --json", "misses its SLO"),
    bad("plan llama-2-7b --gpus c.toml", "does not fit the free memory", "--why", files={"c.toml": TINY_CLUSTER}),
    bad("plan llama-2-7b --gpus c.toml --json", "none of 24", files={"c.toml": TINY_CLUSTER}),
    bad("plan llama-2-7b --min-accuracy 99.9 --gpus c.toml", "none of 24", files={"c.toml": TINY_CLUSTER}),
    bad("plan x.json", "does not fit", files={"x.json": CONFIG.replace(": 32,", f": {10**12},", 1)}),
    policy(RULE + "1 / 0", "policy 'r.py:order' failed: ZeroDivisionError: division by zero (r.py, line 2)"),
    policy(RULE + "import sys; sys.exit(0)", "policy 'r.py:order' failed: SystemExit"),
    policy("def order(): pass", "policy 'r.py:order' failed: TypeError"),
    policy(RULE + "return None", "policy 'r.py:order' failed: TypeError", "must return GPUs"),
    policy(RULE + "return [3, 4]", "returned 3, which is none of the GPUs that it was given"),
    policy(RULE + "return [{}]", "returned {}, which is none of the GPUs that it was given"),
    policy(RULE + "return list(gpus) * 2", "returned a GPU twice"),
]


@pytest.mark.parametrize("case", FAILING, ids=lambda case: case.command + case.files.get("r.py", "")[17:])
def test_what_cannot_be_done_gives_one_line_and_1_and_leaves_nothing(
    case: Case, maveriq: Maveriq, tmp_path: Path
) -> None:
    put(tmp_path, case.files)
    before = everything_in(tmp_path)
    ended = maveriq(case.command)
    line = ended.only_line
    assert [word for word in case.words if word not in line] == [], line
    assert ended.code == 1
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("form", ["--quiet", "--json"])
@pytest.mark.parametrize(
    ("said", "why"),
    [("--gpus c.toml", "does not fit the free memory"), ("--policy r.py:order", "found no GPU for a shard")],
)
def test_where_nothing_can_be_deployed_the_records_say_so(
    maveriq: Maveriq, tmp_path: Path, said: str, why: str, form: str
) -> None:
    put(tmp_path, {"c.toml": TINY_CLUSTER, "r.py": RULE + "return []", "t.csv": TWO_REQUESTS})
    ended = maveriq(f"sim --trace t.csv {said} --out run {form}")
    assert ended.code == 1
    assert "nothing could be deployed" in ended.only_line
    assert why in ended.only_line
    assert "records: run" in ended.only_line
    run = read_run(tmp_path / "run")
    assert {one.status for one in run.deployments} == {"rejected"}
    assert len(run.requests) == 2


def test_one_model_that_fits_nowhere_does_not_stop_the_others(maveriq: Maveriq, tmp_path: Path) -> None:
    put(tmp_path, {"c.toml": CLUSTER + "memory_gib = 10\n", "t.csv": TWO_REQUESTS})
    assert maveriq("sim --trace t.csv --models regular --gpus c.toml --out run --quiet --drain-s 2000").code == 0
    statuses = [one.status for one in read_run(tmp_path / "run").deployments]
    assert "rejected" in statuses
    assert set(statuses) - {"rejected"}


def test_why_shows_what_is_left_out_even_where_nothing_meets_the_slo(maveriq: Maveriq) -> None:
    ended = maveriq(f"{SLOW} --why")
    assert ended.code == 1
    assert "known not to run" in ended.out
    assert ended.err.startswith("maveriq: llama-2-7b: misses its SLO")


# What may happen at any time


@pytest.mark.parametrize("command", ["sim --trace t.csv --quiet --out run", "trace export --out new.csv"])
def test_a_full_disk(command: str, maveriq: Maveriq, tmp_path: Path) -> None:
    put(tmp_path, {"t.csv": TWO_REQUESTS})
    before = everything_in(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        ended = maveriq(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.code == 1
    assert "cannot be written: File too large; make room or name another place" in ended.only_line
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "stopped; no file is left half-written"),
        (MemoryError(), 1, "not enough memory"),
        (KeyError("x"), 1, "this is a bug in maveriq (KeyError: 'x'); MAVERIQ_TRACEBACK=1 shows where"),
    ],
)
def test_whatever_happens_while_records_are_written_the_older_ones_stay(
    maveriq: Maveriq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    put(tmp_path, {"t.csv": TWO_REQUESTS})
    assert maveriq("sim --trace t.csv --quiet --out run").code == 0
    before = everything_in(tmp_path)

    def fail(_samples: object) -> None:
        raise error

    monkeypatch.setattr(runfiles, "_gpu_lines", fail)
    ended = maveriq("sim --trace t.csv --quiet --out run")
    assert ended.code == code
    assert says in ended.only_line
    assert everything_in(tmp_path) == before


def test_a_stop_while_the_new_folder_is_put_in_place_keeps_the_old_one(
    maveriq: Maveriq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"t.csv": TWO_REQUESTS})
    maveriq("sim --trace t.csv --quiet --out run")
    before = everything_in(tmp_path)
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    assert maveriq("sim --trace t.csv --quiet --out run").code == 130
    assert everything_in(tmp_path) == before


def test_a_traceback_is_there_for_who_asks(maveriq: Maveriq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAVERIQ_TRACEBACK", "1")
    ended = maveriq("plan nothing")
    assert ended.err.startswith("Traceback")
    assert ended.err.splitlines()[-1].startswith("maveriq: unknown model 'nothing'")


# The installed command, in a process of its own

COMMAND = Path(sys.executable).with_name("maveriq")


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (f"{COMMAND} sim --scale abc", 2, "'--scale'"),
        (f"{sys.executable} -m maveriq trace check t.csv", 2, "line 2: prompt_tokens"),
        (f"{COMMAND} sim --policy r.py:order", 130, "stopped; no file is left half-written"),
        (f"sh -c '{COMMAND} plan llama-2-7b > /dev/full'", 1, "the output: No space left on device"),
    ],
)
def test_the_installed_command_does_the_same(tmp_path: Path, command: str, code: int, says: str) -> None:
    # Ctrl-C in the middle of the simulation, where the policy is asked for a placement.
    stop = f"import os, signal\n{RULE}os.kill(os.getpid(), signal.SIGINT)\n    return gpus\n"
    put(tmp_path, {"t.csv": SCHEDULE + "1,1,x,1\n", "r.py": stop})
    before = everything_in(tmp_path)
    ended = subprocess.run(
        shlex.split(command),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
        # A shell that starts a job in the background lets it ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert ended.returncode == code
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    assert line.startswith("maveriq: ")
    assert says in line
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("command", ["sim --trace t.csv --out run --quiet --json", "plan llama-2-7b"])
def test_a_reader_that_has_seen_enough(tmp_path: Path, command: str) -> None:
    put(tmp_path, {"t.csv": TWO_REQUESTS})
    with subprocess.Popen(
        [COMMAND, *shlex.split(command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
    if command.startswith("sim"):
        assert len(read_run(tmp_path / "run").requests) == 2
