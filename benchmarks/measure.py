"""A path's cases, measured one after another."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import torch
from paths import Bench
from peaks import Peaks, device_name, measured_peaks
from peer import load_peer, official_module
from report import Record, print_table, quartiles, write_json
from resident import give_back_freed_tensors
from rich.console import Console
from subject import DTYPES, Subject, open_subjects
from timing import Case, Failure, Timing, Variant, release, timed_in_turns, working_memory

REFERENCE = "peer"
SECOND = "starflow"
"""What the variants of the second subject are called, in place of "ours"."""


def measure(bench: Bench, command: str, console: Console, until: float = math.inf) -> list[Record]:
    """Measure, print a table, and write JSON after each case, so that what is done is not lost.

    Args:
        bench: what is measured.
        command: by which, for the records.
        console: where it is told.
        until: of `time.monotonic()`, after which no case begins, and no repetition that can be left out.

    Raises:
        ValueError: settings that do not fit together, or no such variant; after all else, if a variant failed or there
            was no time for a case.
        OSError: model or peer can't be loaded.
    """
    device = bench.torch_device()
    if bench.threads is not None:
        torch.set_num_threads(bench.threads)
    subjects, peer = _opened(bench)
    chosen = [
        (size, _chosen(bench, case)) for size in bench.batch_sizes for case in _cases(bench, subjects, size, peer)
    ]
    if bench.json is not None:
        bench.json.parent.mkdir(parents=True, exist_ok=True)  # or refused before any work
    peaks = measured_peaks(device)
    records: list[Record] = []
    missing: list[str] = []
    try:
        for size, case in chosen:
            if time.monotonic() > until:
                missing.append(f"{case.name} of {size} images: no time is left")
                continue
            console.print(f"{case.name}, {size} images: {'; '.join(v.name for v in case.variants)}", style="dim")
            memory = [_memory(bench, size, case, variant) for variant in case.variants]
            timings = timed_in_turns(case.variants, bench.repeats, bench.warm_up, device, until)
            measured = {v.name: t for v, t in zip(case.variants, timings, strict=True) if isinstance(t, Timing)}
            for variant, *found in zip(case.variants, timings, memory, strict=True):
                reasons = {one.reason for one in found if isinstance(one, Failure)}
                missing += [f"{case.name} of {size} images, {variant.name}: {reason}" for reason in sorted(reasons)]
            used = {v.name: m for v, m in zip(case.variants, memory, strict=True) if not isinstance(m, Failure)}
            records += _records(bench, subjects, size, case, measured, used, peaks, command)
            if bench.json is not None:
                write_json(records, bench.json)
    finally:  # also if memory runs out in a later case
        if records:
            print_table(records, console)
    if missing:
        raise ValueError("not measured: " + "; ".join(missing))
    return records


def _opened(bench: Bench) -> tuple[list[Subject], Any | None]:
    module = None if bench.peer is None else official_module(bench.peer)  # first: refused before a model is loaded
    subjects = open_subjects(bench)
    return subjects, None if module is None else load_peer(module, subjects[0].flow)


def _cases(bench: Bench, subjects: Sequence[Subject], batch_size: int, peer: Any | None) -> list[Case]:
    """Those of the first, each with the variants of the second one in the same turns; the peer is of the first."""
    cases = bench.cases(subjects[0], batch_size, peer)
    for subject in subjects[1:]:
        others = bench.cases(subject, batch_size, None)
        cases = [Case(a.name, [*a.variants, *map(_second, b.variants)]) for a, b in zip(cases, others, strict=True)]
    return cases


def _second(variant: Variant) -> Variant:
    return replace(variant, name=f"{SECOND}{variant.name.removeprefix('ours')}")


def _chosen(bench: Bench, case: Case) -> Case:
    names = [variant.name for variant in case.variants]
    unknown = [name for name in bench.only if name not in names]
    if unknown:
        raise ValueError(f"--only names {unknown[0]!r}; expected some of: {', '.join(names)}.")
    return Case(case.name, [variant for variant in case.variants if not bench.only or variant.name in bench.only])


def _memory(bench: Bench, batch_size: int, case: Case, variant: Variant) -> int | Failure | None:
    if not bench.memory:
        return None
    try:
        if bench.torch_device().type == "cuda":
            return working_memory(variant, bench.torch_device())
        give_back_freed_tensors()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_alone, bench, batch_size, case.name, variant.name, torch.get_num_threads()).result()
    except Exception as error:  # the others are measured all the same
        return Failure.of(error)
    finally:
        release(bench.torch_device())


def _alone(bench: Bench, batch_size: int, case_name: str, variant_name: str, threads: int) -> int | None:
    """`working_memory` in a fresh process, whose memory nothing has touched."""
    torch.set_num_threads(threads)
    subjects, peer = _opened(bench)
    case = next(case for case in _cases(bench, subjects, batch_size, peer) if case.name == case_name)
    variant = next(variant for variant in case.variants if variant.name == variant_name)
    return working_memory(variant, bench.torch_device())


def _records(
    bench: Bench,
    subjects: Sequence[Subject],
    batch_size: int,
    case: Case,
    timings: Mapping[str, Timing],
    memory: Mapping[str, int | None],
    peaks: Peaks,
    command: str,
) -> list[Record]:
    """Of the variants that did not fail, by name; compared with the peer, or without one with the first."""
    reference = REFERENCE if REFERENCE in timings else next(iter(timings), "")
    records = []
    for variant in (variant for variant in case.variants if variant.name in timings):
        timing, compared = timings[variant.name], variant.name != reference
        subject = subjects[variant.name.startswith(SECOND)]
        low, middle, high = quartiles(timing.seconds)
        least, peak = variant.floor(peaks), peaks[DTYPES[variant.dtype]]
        own, other = memory.get(variant.name), memory.get(reference)
        finite = bool(timing.result.isfinite().all())
        alike = compared and subject is subjects[0]
        differs = float((timing.result - timings[reference].result).abs().max())
        records.append(
            Record(
                path=bench.name,
                case=case.name,
                variant=variant.name,
                model=subject.name,
                sizes=asdict(subject.recipe.model),
                parameters=sum(parameter.numel() for parameter in subject.flow.parameters()),
                batch_size=batch_size,
                dtype=variant.dtype,
                device=device_name(bench.torch_device()),
                threads=torch.get_num_threads(),
                torch_version=torch.__version__,
                repeats=len(timing.seconds),
                seconds=middle,
                lower_quartile=low,
                upper_quartile=high,
                images_per_second=batch_size / middle,
                peak_bytes=own,
                reference=reference if compared else None,
                times_as_fast=statistics.median(timings[reference].seconds) / middle if compared else None,
                times_the_memory=own / other if compared and own and other else None,
                largest_difference=differs if alike and math.isfinite(differs) else None,
                finite=finite,
                floor_seconds=least,
                times_floor=middle / least,
                peak_flops_per_second=peak.flops_per_second,
                peak_bytes_per_second=peak.bytes_per_second,
                date=datetime.now(UTC).isoformat(timespec="seconds"),
                command=command,
            )
        )
    return records
