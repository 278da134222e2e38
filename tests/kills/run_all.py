#!/usr/bin/env python3
"""Kill the operator before and after every single API call it makes in a whole job: `make test-kills`.

Takes some minutes. Each job is one death: SIGKILL, a new operator at once, and in the end exactly one Job of each
stage, every stage in its first attempt, no event twice and no child without its owner. A line for each death, and a
last line of JSON; the exit code is 1 when any of them left something wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import kill_runs
import kube
import operator_account
import other_operators
from kill_runs import Plan, Verdict
from operator_account import Account
from other_operators import OtherOperatorRan
from raw_api import Api, read_access

from finetune_operator.api.constants import CRD_NAME

ROOT = Path(__file__).resolve().parents[2]


def tell(verdict: Verdict) -> None:
    what = "nobody killed" if verdict.death is None else str(verdict.death)
    where = f", {verdict.struck}" if verdict.struck else " (not reached)" if verdict.death else ""
    print(f"{verdict.seconds:5.1f} s  {what}{where}: {'; '.join(verdict.problems) or 'well'}", flush=True)


async def run(args: argparse.Namespace, account: Account, folder: Path) -> int:
    begun = time.monotonic()
    plan = Plan(first=args.first, step=args.step)
    prefix = f"kills-{uuid.uuid4().hex[:6]}"
    access, operators = await read_access(), await read_access(str(account.kubeconfig))
    async with Api(access) as api, other_operators.paused(api):
        async with kill_runs.Lane(access, operators, f"{prefix}-calm", folder) as lane:
            calm = await lane.run(None)
        tell(calm)
        verdicts, problems = await kill_runs.sweep(access, operators, prefix, folder, args.lanes, plan, tell)
    for problem in problems:
        print(problem)
    verdicts.append(calm)
    struck = [verdict for verdict in verdicts if verdict.struck is not None]
    bad = [verdict for verdict in verdicts if verdict.problems]
    summary = {
        "calls_of_a_job": len(calm.calls),
        "mutating_calls_of_a_job": sum(call.mutates for call in calm.calls),
        "deaths": len(struck),
        "deaths_before": sum(verdict.death.moment == "before" for verdict in struck if verdict.death),
        "deaths_after": sum(verdict.death.moment == "after" for verdict in struck if verdict.death),
        "deaths_at_mutating_calls": sum(verdict.struck.mutates for verdict in struck if verdict.struck),
        "jobs_with_problems": len(bad),
        "other_problems": len(problems),
        "slowest_job_s": round(max(verdict.seconds for verdict in verdicts), 1),
        "seconds": round(time.monotonic() - begun),
    }
    print(json.dumps(summary), flush=True)
    return 1 if bad or problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, default=3, help="jobs at once")
    parser.add_argument("--first", type=int, default=1, help="number of the first call to die at")
    parser.add_argument("--step", type=int, default=1, help="die at every so manyth call")
    parser.add_argument("--keep", type=Path, help="keep the operators' logs in this folder")
    args = parser.parse_args()
    if not os.environ.get("KUBECONFIG"):
        print("run_all: KUBECONFIG is not set; run it by `make test-kills`", file=sys.stderr)
        return 2
    kube.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    kube.kubectl("wait", "--for=condition=Established", f"crd/{CRD_NAME}", "--timeout=30s")
    with tempfile.TemporaryDirectory() as temporary, operator_account.made(Path(temporary)) as account:
        if args.keep is not None:
            args.keep.mkdir(parents=True, exist_ok=True)
        try:
            return asyncio.run(run(args, account, args.keep or Path(temporary)))
        except OtherOperatorRan as problem:
            print(f"run_all: {problem}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
