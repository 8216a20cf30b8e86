"""Stand-ins for programs that other machines are managed with, as far as the examples in docs/examples use them.

Called by the name of a link: ``sbatch``, ``squeue``, ``scancel`` (Slurm), ``aws`` (AWS CLI), ``spotjax``. What there is
is in the JSON file ``STUB_STATE``. Options that the examples do not use are errors, as are wrong ones with the real
programs; ``fails`` in the file is a message that the next ``sbatch`` or ``run-instances`` fails with, after it did what
it was asked when ``loses`` is there too.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

State = dict[str, Any]
LAUNCHED = "2026-11-22T10:00:00"


def main() -> None:
    """Runs the program of that name."""
    program = os.path.basename(sys.argv[0])
    with state() as there:
        PROGRAMS[program](there, sys.argv[1:])


@contextlib.contextmanager
def state() -> Iterator[State]:
    """What there is; one program at a time."""
    with open(os.environ["STUB_STATE"], "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        there = json.load(file)
        try:
            yield there
        finally:
            file.seek(0)
            file.truncate()
            json.dump(there, file)


def fail(code: int, message: str) -> NoReturn:
    """Ends as a program that says what went wrong."""
    print(message, file=sys.stderr)
    sys.exit(code)


def failure(there: State, act: Callable[[], None]) -> str:
    """Acts, unless it is to fail before; the message that it is to fail with."""
    loses, message = there.pop("loses", None), str(there.pop("fails", ""))
    if loses or not message:
        act()
    return message


# -- Slurm


def sbatch(there: State, words: list[str]) -> None:
    """Submits the script on standard input."""
    options = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--parsable", "--no-requeue"):
        options.add_argument(flag, action="store_true", required=True)
    for flag in ("--dependency", "--job-name", "--comment", "--gres", "--partition"):
        options.add_argument(flag, required=True)
    options.add_argument("--qos", default="normal")
    told = options.parse_args(words)
    assert told.dependency == "singleton" and sys.stdin.read().startswith("#!/bin/bash\n#SBATCH ")
    exported = {name: value for name, value in os.environ.items() if name.startswith("SPOTJAX_")}
    there["next"] = number = there.get("next", 1000) + 1

    def act() -> None:
        there["jobs"][str(number)] = {
            "name": told.job_name, "comment": told.comment, "partition": told.partition, "state": "PENDING",
            "qos": told.qos, "exported": exported,
        }  # fmt: skip

    if message := failure(there, act):
        fail(1, f"sbatch: error: {message}")
    print(f"{number};cluster")


def squeue(there: State, words: list[str]) -> None:
    """Lists jobs that have not ended; at every call those that can begin do."""
    assert words[:2] == ["--noheader", "--me"] and words[2].startswith("--format="), words
    if there.get("unreachable"):
        fail(1, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    jobs = there["jobs"]
    for job in jobs.values():
        running = {other["name"] for other in jobs.values() if other["state"] == "RUNNING"}
        full = len([o for o in jobs.values() if o["state"] == "RUNNING"]) >= there.get("nodes", 99)
        if job["state"] == "PENDING" and job["name"] not in running and not full:
            job["state"] = "RUNNING"
    for number, job in list(jobs.items()):
        fields = {
            "%i": number, "%T": job["state"], "%j": job["name"], "%P": job["partition"], "%V": LAUNCHED,
            "%r": "Resources" if job["state"] == "PENDING" else "None", "%k": job["comment"],
        }  # fmt: skip
        print("|".join(fields[part] for part in words[2].removeprefix("--format=").split("|")))
        if job["state"] == "COMPLETING":
            del jobs[number]


def scancel(there: State, words: list[str]) -> None:
    """Ends jobs; those that ran take a while."""
    assert words[0] == "--quiet", words
    for number in words[1:]:
        if number not in there["jobs"]:
            return  # with --quiet that is no error
        if there["jobs"][number]["state"] == "PENDING":
            del there["jobs"][number]
        else:
            there["jobs"][number]["state"] = "COMPLETING"


# -- AWS CLI


def aws(there: State, words: list[str]) -> None:
    """``aws ec2``."""
    service, operation, *rest = words
    assert service == "ec2" and os.environ["AWS_REGION"], "a region is needed"
    if there.get("unreachable"):
        fail(255, 'Could not connect to the endpoint URL: "https://ec2.eu-west-1.amazonaws.com/"')
    AWS[operation](there, rest)


def run_instances(there: State, words: list[str]) -> None:
    """Starts an instance, or returns the one that was started with the same client token."""
    options = argparse.ArgumentParser(allow_abbrev=False)
    for flag in (
        "--count", "--client-token", "--launch-template", "--instance-type", "--placement", "--user-data",
        "--instance-initiated-shutdown-behavior", "--tag-specifications", "--query", "--output",
    ):  # fmt: skip
        options.add_argument(flag, required=True)
    options.add_argument("--instance-market-options", default="")
    told = options.parse_args(words)
    assert told.query == "Instances[].InstanceId" and len(told.client_token) == 64
    kind, _, listed = told.tag_specifications.partition(",Tags=")
    assert kind == "ResourceType=instance", kind
    tags = dict(pair.removeprefix("Key=").split(",Value=") for pair in listed[2:-2].split("},{"))
    with open(told.user_data.removeprefix("file://")) as script:
        data = script.read()
    same = [i for i in there["instances"].values() if i["token"] == told.client_token]
    identity = same[0]["id"] if same else f"i-{len(there['instances']):017x}"
    new = {
        "id": identity, "token": told.client_token, "type": told.instance_type, "tags": tags, "state": "pending",
        "zone": told.placement.removeprefix("AvailabilityZone="), "data": data, "market": told.instance_market_options,
        "template": told.launch_template,
    }  # fmt: skip

    def act() -> None:
        there["instances"].setdefault(identity, new)

    if message := failure(there, act):
        if not message.startswith("("):
            fail(255, message)
        fail(254, f"\nAn error occurred {message} when calling the RunInstances operation: because")
    print(identity)


def describe_instances(there: State, words: list[str]) -> None:
    """Lists instances; with every call they go on."""
    options = argparse.ArgumentParser(allow_abbrev=False)
    options.add_argument("--filters", nargs="+", required=True)
    options.add_argument("--query", required=True)
    options.add_argument("--output", required=True, choices=["text"])
    told = options.parse_args(words)
    wanted = {name: values.split(",") for name, values in (one[5:].split(",Values=", 1) for one in told.filters)}
    found = []
    for instance in there["instances"].values():
        seen = {"instance-state-name": instance["state"]} | {f"tag:{n}": v for n, v in instance["tags"].items()}
        if all(seen.get(name) in values for name, values in wanted.items()):
            found.append(dict(instance))
    for instance in there["instances"].values():
        instance["state"] = {"pending": "running", "shutting-down": "terminated"}.get(
            instance["state"], instance["state"]
        )
    if told.query in ("Reservations[].Instances[].InstanceId", "sort(Reservations[].Instances[].InstanceId)"):
        print("\t".join(sorted(instance["id"] for instance in found)))
        return
    tag = "Tags[?Key==`spotjax-{}`]|[0].Value"
    columns = f"{tag.format('name')},{tag.format('price-class')}"
    columns += ",InstanceType,Placement.AvailabilityZone,State.Name,InstanceId,LaunchTime"
    assert told.query == f"Reservations[].Instances[].[{columns}]", told.query
    for i in found:
        tags = i["tags"]
        row = tags["spotjax-name"], tags["spotjax-price-class"], i["type"], i["zone"], i["state"], i["id"]
        print("\t".join([*row, f"{LAUNCHED}+00:00"]))


def terminate_instances(there: State, words: list[str]) -> None:
    """Ends instances."""
    assert words[0] == "--instance-ids" and words[-4] == "--query", words
    for identity in words[1:-4]:
        there["instances"][identity]["state"] = "shutting-down"
        print(identity)


def spotjax(there: State, words: list[str]) -> None:
    """Notes what it was told, and prints what looks like a script."""
    there["bootstrap"] = shlex.join(words)
    print(f"#!/bin/bash\n#SBATCH --requeue\n# {time.time()}" if "slurm" in words else "#!/bin/bash")


AWS = {
    "run-instances": run_instances,
    "describe-instances": describe_instances,
    "terminate-instances": terminate_instances,
}
PROGRAMS = {"sbatch": sbatch, "squeue": squeue, "scancel": scancel, "aws": aws, "spotjax": spotjax}

if __name__ == "__main__":
    main()
