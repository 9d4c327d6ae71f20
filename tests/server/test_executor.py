"""Groups of one member, as LoneExecutor makes them; in a process of their own, because torch has one default group."""

import json
import subprocess
import sys

import pytest

# What collectives over a new group answer, and how many of gloo's threads there are: of gloo's groups, then of ours.
SCRIPT = """
import contextlib, json, os, sys, torch, torch.distributed as dist
from server.executor import groups_without_threads

def told(making):
    dist.init_process_group("gloo", store=dist.HashStore(), world_size=1, rank=0)
    with making:
        groups = [dist.new_group([0], backend="gloo") for _ in range(5)]
    group, given = groups[0], torch.tensor([1.0, 2.0])
    dist.barrier(group)
    dist.all_reduce(summed := given.clone(), group=group)
    dist.broadcast(sent := given.clone(), 0, group=group)
    dist.all_gather(gathered := [torch.zeros(2)], given, group=group)
    dist.all_gather_into_tensor(joined := torch.zeros(2), given, group=group)
    dist.all_gather_object(objects := [None], {"a": 1}, group=group)
    dist.broadcast_object_list(listed := ["b"], 0, group=group)
    threads = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
    later = dist.get_backend(dist.new_group([0]))
    for one in groups:
        dist.destroy_process_group(one)
    dist.destroy_process_group()
    answers = [summed.tolist(), sent.tolist(), gathered[0].tolist(), joined.tolist(), objects, listed, later]
    return [answers, threads.count("gloo_tcp_loop")]

def refused():
    dist.init_process_group("fake", store=dist.HashStore(), world_size=2, rank=0)
    try:
        with groups_without_threads():
            dist.new_group([0])
    except ValueError as error:
        return str(error)

print(json.dumps([told(contextlib.nullcontext()), told(groups_without_threads()), refused()]))
"""


@pytest.fixture(scope="module")
def told():
    command = [sys.executable, "-c", SCRIPT]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_a_group_of_one_answers_what_gloo_answers(told):
    (gloo, _), (lone, _), _ = told
    assert lone == gloo
    assert lone[-1] == "gloo"  # what is made afterwards is made as asked


def test_only_the_default_group_has_a_thread(told):
    (_, gloo), (_, lone), _ = told
    assert (gloo, lone) == (6, 1)


def test_a_model_that_is_split_is_refused(told):
    assert told[2] == "LoneExecutor is for a model that is not split: name another executor"
