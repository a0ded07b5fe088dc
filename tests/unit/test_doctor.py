"""`wastenot doctor`: packages are judged by their import alone, ranks by what they say of themselves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from wastenot.launch.layout_rules import LAYOUT_RULES, world_rules
from wastenot.launch.rank_map import RankReport, problems
from wastenot.tools import selftest_parity
from wastenot.tools.cli import main
from wastenot.tools.packages import PROBES, Probe, examine

APEX = next(probe for probe in PROBES if probe.name == "NVIDIA apex")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package that Python finds first."""

    def write(name: str, body: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(body)

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return write


def probe(name: str) -> Probe:
    code = f"import {name}\nversion = {name}.__version__"
    return Probe(name=name, extra="hf", purpose="a test", module=name, code=code)


@pytest.mark.parametrize(
    ("body", "state", "version", "note"),
    [
        ("print('noise')\n__version__ = '1.2'", "works", "1.2", ""),
        ("raise RuntimeError('no driver\\n here')", "broken", "", "RuntimeError: no driver here"),
        ("import os; os._exit(3)", "broken", "", "its import ended the process with exit code 3"),
        ("import time; time.sleep(60)", "broken", "", "its import did not end within 2 s"),
        ("import no_such_dependency", "broken", "", "it lacks no_such_dependency"),
        ("", "broken", "", "AttributeError: module 'probed' has no attribute '__version__'"),
    ],
    ids=["works", "raises", "exits", "hangs", "lacks a dependency", "is another"],
)
def test_a_package_is_what_its_import_does(package, body, state, version, note):
    package("probed", body)
    (found,) = examine([probe("probed")], seconds=2)
    assert (found.state, found.version, found.note) == (state, version, note)


def test_what_is_not_installed_is_missing_with_the_line_that_installs_it():
    (found,) = examine([probe("no_such_package")])
    assert (found.state, found.install) == ("missing", "pip install 'wastenot[hf]'")


def test_a_package_called_apex_is_not_taken_for_nvidias(package):
    package("apex", "__version__ = '0.9.10dev'")
    (found,) = examine([APEX])
    assert (found.state, found.note) == ("broken", "it lacks apex.optimizers")
    assert "pip install" not in found.install


def test_the_report_is_one_json_object_and_the_selftest_passes(capfd):
    assert main(["doctor", "--selftest", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["backends"]["gloo"] is True
    assert report["versions"]["torch"] and report["versions"]["wastenot"]
    assert {entry["name"] for entry in report["packages"]} == {probe.name for probe in PROBES}
    assert all(entry["state"] == "works" or entry["install"] for entry in report["packages"])
    assert {finding["name"]: finding["good"] for finding in report["selftest"]} == {
        "all_reduce": True,
        "all_to_all": True,
        "all_gather": True,
        "training, expert 2": True,
        "training, shard 2": True,
        "training, tensor 2": True,
        "training, pipeline 2": True,
    }


def test_every_kind_of_parallelism_that_the_ranks_allow_is_tried():
    assert [selftest_parity.name_of(layout) for layout in selftest_parity.layouts(1)] == ["training"]
    assert [selftest_parity.name_of(layout) for layout in selftest_parity.layouts(12)] == [
        "training, expert 6",
        "training, shard 6",
        "training, tensor 6",
        "training, pipeline 6",
        "training, tensor 2, expert 4",
        "training, pipeline 2, shard 2, expert 2",
    ]
    for world in range(1, 33):
        for layout in selftest_parity.layouts(world):
            config = selftest_parity._config(layout, world)
            assert not [*world_rules(config, world), *(found for rule in LAYOUT_RULES for found in rule(config))]


def reports(world: int = 4, hosts: int = 2, gpus: bool = False) -> list[RankReport]:
    """Ranks that fit together, in equal parts on `hosts` hosts."""
    here = world // hosts
    return [
        RankReport(
            rank=rank,
            world=world,
            local_rank=rank % here,
            local_world=here,
            launcher="torchrun",
            host=f"node{rank // here}",
            home=f"home{rank // here}",
            pid=100 + rank,
            device=f"cuda:{rank % here}" if gpus else "cpu",
            device_id=f"GPU-{rank}" if gpus else "",
            address="node0",
            source=f"10.0.0.{rank // here}",
            interface="eth0",
            interfaces=("lo", "eth0", "ib0"),
            versions={"torch": "2.13.0"},
        )
        for rank in range(world)
    ]


@pytest.mark.parametrize(("hosts", "gpus"), [(1, False), (2, False), (2, True)])
def test_ranks_that_fit_together_have_no_problems(hosts, gpus):
    assert problems(reports(hosts=hosts, gpus=gpus)) == []


@pytest.mark.parametrize(
    ("rank", "changes", "message"),
    [
        (2, {"rank": 1}, "RANK 1 is claimed by process 101 on node0 and process 102 on node1; give each"),
        (3, {"world": 8}, "the ranks disagree on WORLD_SIZE: 4 say ranks 0, 1, 2; 8 say ranks 3"),
        (1, {"local_rank": 0}, "LOCAL_RANK 0 is claimed by ranks 0, 1, which share host node0"),
        (1, {"device_id": "GPU-0", "device": "cuda:0"}, "ranks 0, 1 share cuda:0 of node0, which nccl refuses"),
        (0, {"local_world": 4}, "host node0 has 2 ranks, which say LOCAL_WORLD_SIZE 2 or 4; set it to 2"),
        (3, {"address": "node1"}, "the ranks disagree on MASTER_ADDR: node0 say ranks 0, 1, 2; node1 say ranks 3"),
        (
            2,
            {"chosen_interface": "eth9"},
            "rank 2: GLOO_SOCKET_IFNAME eth9 does not exist on node1; use one of lo, eth0",
        ),
        (3, {"versions": {"torch": "2.11.0"}}, "torch is 2.13.0 on rank 0 (node0), 2.11.0 on rank 3 (node1); install"),
        (2, {"chosen_interface": "ib0"}, "rank 2: GLOO_SOCKET_IFNAME is ib0, but the way to node0 is eth0; use that"),
    ],
)
def test_each_contradiction_is_named(rank, changes, message):
    found = reports(gpus=True)
    found[rank] = replace(found[rank], **changes)
    assert any(message in problem for problem in problems(found)), problems(found)


def test_absent_ranks_are_named_and_loopback_across_hosts_is_why():
    here = [replace(r, address="localhost", source="127.0.0.1", interface="lo") for r in reports()[:2]]
    absent, loopback = problems(here)
    assert absent.startswith("of 4 ranks [2, 3] did not come")
    assert loopback.startswith("MASTER_ADDR localhost is host node0 only")


def test_nodes_played_on_one_machine_are_fine_on_cpus():
    one_home = [replace(r, home="home", source="127.0.0.1", interface="lo") for r in reports()]
    assert problems(one_home) == []
