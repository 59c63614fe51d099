"""A recorded testbed with two small runs, in the published format."""

import gzip
from pathlib import Path

RUN, BASELINE = "MaverIQ_tiny", "AlpaServe_tiny"

_FALCON = "10.465 10.465 10.465 10.465 0.465 0.465 0.465 0.465"
_BOTH = "10.465 14.465 10.465 10.465 0.465 0.465 0.465 0.465"
TABLES = {
    "runs.csv": "run,policy,model_set,intent,trace,rate_scale,slo_scale,scheduled,completed,deployments\n"
    f"{RUN},MaverIQ,large,min_cost,code,0.1,5.0,5,3,2\n"
    f"{BASELINE},AlpaServe,large,,code,0.1,0,2,2,1\n",
    # Endpoint 1 of the first run, the first model of its set, was never requested.
    "deployments.csv": "run,model_id,model,deploy_s,deployed,registered_s,tp,pp,layer_split,weight_dtype,int8_kv,gpus,"
    "est_gib_per_gpu,used_gib_after\n"
    f"{RUN},2,falcon-40b,270.0,1,,2,2,32 28,int4,0,3 0 1 2,9.5 9.5 9.5 9.5,{_FALCON}\n"
    f"{RUN},3,llama-2-7b,510.0,1,530.25,1,1,32,int4,1,1,3.9,{_BOTH}\n"
    f"{BASELINE},1,llama-2-7b,0.0,1,,1,1,32,float16,0,0,,13.465 0.465 0.465 0.465 0.465 0.465 0.465 0.465\n",
    "scheduled.csv": "run,req_id,model_id,scheduled_s,prompt_chars\n"
    f"{RUN},1,1,100.0,40\n{RUN},2,2,330.0,400\n{RUN},3,3,600.0,1\n{RUN},4,3,600.1,80\n{RUN},5,2,601.0,40\n"
    f"{BASELINE},1,1,100.0,40\n{BASELINE},2,1,101.0,40\n",
    # Numbers count admitted requests: the first request of the schedule was dropped.
    "completed.csv": "run,req_id,model_id,arrival_s,latency_s,service_s\n"
    f"{RUN},1,2,330.05,1.5,1.49\n{RUN},2,3,599.95,0.51,0.5\n{RUN},3,3,600.05,0.91,0.5\n"
    f"{BASELINE},1,1,100.0,0.51,0.5\n{BASELINE},2,1,101.0,0.51,0.5\n",
}


def recorded_files(**changed: tuple[str, str]) -> dict[str, bytes]:
    """Return the files by name, with a text replaced: `completed=("0.51", "x")`."""
    files = {}
    for name, text in TABLES.items():
        old, new = changed.get(name.partition(".")[0], ("", ""))
        assert old in text
        content = (text.replace(old, new, 1) if old else text).encode(errors="surrogatepass")
        packed = name in ("scheduled.csv", "completed.csv")
        files[f"{name}.gz" if packed else name] = gzip.compress(content, mtime=0) if packed else content
    return files


def put_testbed(folder: Path, **changed: tuple[str, str]) -> Path:
    """Write the files into a folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in recorded_files(**changed).items():
        (folder / name).write_bytes(content)
    return folder
