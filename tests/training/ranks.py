"""One rank of a team, as a process: `python -m tests.training.ranks CONFIG OUT TREE_RANKS`; the first tells what was seen."""

import json
import sys
from pathlib import Path

import torch

from training.config import load_config
from training.digits import load_digits
from training.distributed import TeamError, join
from training.trainer import train

config, out, tree_ranks = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
losses: list[float] = []
with join("cpu", tree_ranks) as team:
    train(load_config(config), out, load_digits(4), lambda report: losses.append(report.loss), team=team)
    complaint = ""
    try:
        team.require_agreement(team.rank, "number")
    except TeamError as exc:
        complaint = str(exc)
threads = [name for file in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := file.read_text())]
traffic = {"summed": team.traffic.summed, "gathered": team.traffic.gathered, "threads": threads}
if team.leads:
    json.dump(traffic | {"losses": losses, "complaint": complaint}, sys.stdout)
elif threads:
    raise SystemExit(f"threads of the team outlive it: {threads}")
