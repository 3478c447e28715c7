"""Does TSE mean anything? Its AUC against the answer of STAR's users whether the task was done.

    python3 examples/star/tse_validity.py path/to/STAR --out examples/star/tse_validity.md

TSE is that of ``openrlhf_gopo.cli.logs score``: from turns and tool results alone. AUC is the chance that a dialogue
whose user said yes has the higher score than one whose user said no; ties count half. Intervals: 95%, percentile
bootstrap over dialogues. ``--ceiling`` (needs scikit-learn) adds what a learned classifier reaches.
The definition was chosen on the development half of the dialogues; the other half was looked at once.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from tse_scores import HALVES, Case, cases, forest, scores_of

from openrlhf_gopo.errors import DataError, GopoError

BASELINES = ("number of turns", "fewer turns", "fewer words", "last strategy", "task alone")

# -- text -------------------------------------------------------------------------------------------------------------

HEAD = """# TSE against the user's own answer, on STAR

Written by `tse_validity.py`. {goals} human dialogues have a goal. In {asked} of them the user was asked afterwards
whether the task was done, and {no} ({share:.0%}) said no. The others, all of those over several tasks among them, were
asked about manners only ("... stay calm and helpful ..."), which says nothing of the task; nor do "Did you enjoy this
task?" and "... say something about rain?". The wizard was asked about the user's behaviour, never whether the task was
done: there is no second opinion on an answer. Unhappy dialogues (the user was told to be difficult, or the tool to
refuse) count like the others.

AUC: the chance that a dialogue whose user said yes has the higher score than one whose user said no; ties ({ties:.1%}
of these pairs for TSE) count half. Intervals: 95%, percentile bootstrap over dialogues, {resamples} resamples.

- *Held out*: {held} dialogues by a hash of their id; the definition of the outcome and its weights were chosen on the
  others alone. (Answers by task and last result had been counted over all dialogues before that.)
- *Question fits*: without {odd} dialogues of a search task whose users were asked whether a reservation was made. That
  task's wizard has no means to reserve; users answered yes or no as they took the question.
- *Within tasks*: where the question fits, only pairs of one task; a score that knows nothing but the task has 0.5.
- *Rate learned*: the share of yes under the same key in the development half. These scores, and the random forest (ten
  folds), have seen answers; TSE has seen none. The forest estimates what can be told from the log at all."""
BY_TASK = """## By task, both halves

Most tasks have too few users who said no to say anything by themselves."""
CHANGES = """## What was changed, and what each change gave

Before, a goal's subgoals were the slots, the reports and the goodbye: a wizard who reported properly that no room is
left had done everything, and the user said that no room was reserved. Now what the user came for is a subgoal too
(`openrlhf_gopo/envs/star_outcome.py`), in logs and in rollouts. Weights of slots, reports, outcomes, goodbye:
0.3/0.6/0/0.1, then 0.2/0.3/0.4/0.1, then 0.2/0.25/0.5/0.05. In a rollout an outcome is what the tool's results say;
in a log, what the customer was told."""
ANSWERS = """## How noisy the answers are

Answers against the news that the customer had in the end, where the question fits. Yes after no good news, and no after
nothing but good news, are disagreements that no reading of the outcome can undo."""


# -- AUC --------------------------------------------------------------------------------------------------------------


def wins(scores: np.ndarray, done: np.ndarray) -> float:
    """The pairs (yes, no) that the scores order rightly; a tie is half a pair."""
    yes, no = scores[done], np.sort(scores[~done])
    below, upto = np.searchsorted(no, yes, "left"), np.searchsorted(no, yes, "right")
    return float((below + upto).sum()) / 2


def auc(scores: np.ndarray, done: np.ndarray) -> float:
    """The share of pairs (yes, no) ordered rightly; NaN unless both answers occur."""
    pairs = int(done.sum()) * int((~done).sum())
    return wins(scores, done) / pairs if pairs else math.nan


def auc_within(scores: np.ndarray, done: np.ndarray, groups: np.ndarray) -> float:
    """The same over pairs of one group only: what a score knows beyond which task it is."""
    total, pairs = 0.0, 0
    for group in np.unique(groups):
        of = groups == group
        total += wins(scores[of], done[of])
        pairs += int(done[of].sum()) * int((~done[of]).sum())
    return total / pairs if pairs else math.nan


def interval(statistic: Callable[[np.ndarray], float], count: int, resamples: int) -> tuple[float, float, float]:
    """``statistic`` of all ``count`` indices with its 95% bootstrap interval, without the resamples where it is NaN."""
    rng = np.random.default_rng(0)
    drawn = [statistic(rng.integers(count, size=count)) for _ in range(resamples)]
    known = [value for value in drawn if not math.isnan(value)]
    low, high = np.percentile(known, (2.5, 97.5)) if known else (math.nan, math.nan)
    return statistic(np.arange(count)), float(low), float(high)


def shown(statistic: Callable[[np.ndarray], float], count: int, resamples: int) -> str:
    """A cell: ``statistic`` and its interval; "-" where it is not defined."""
    value, low, high = interval(statistic, count, resamples)
    return "-" if math.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


# -- the page ---------------------------------------------------------------------------------------------------------


class Page:
    """The result as Markdown; ``choose`` below are indices into ``found``."""

    def __init__(self, found: Sequence[Case], goals: int, resamples: int, ceiling: bool) -> None:
        self.found, self.goals, self.resamples = found, goals, resamples
        self.done = np.array([case.done for case in found])
        self.tasks = np.array([case.task for case in found])
        self.main, self.path = scores_of(found, self.done)
        if ceiling:
            self.main["random forest on the log, out of fold"] = forest(found, self.done)
        self.fits = np.array([case.fits for case in found])
        self.half = {half: np.array([case.half == half for case in found]) for half in HALVES}

    def cell(self, scores: np.ndarray, choose: np.ndarray, within: bool = False) -> str:
        """AUC with its interval; "-" without both answers, or where the score is not known."""
        s, d, g = scores[choose], self.done[choose], self.tasks[choose]
        if d.all() or not d.any() or np.isnan(s).any():
            return "-"
        return shown(lambda i: auc_within(s[i], d[i], g[i]) if within else auc(s[i], d[i]), len(s), self.resamples)

    def overall(self) -> list[str]:
        """Every score on the held-out half and on all: any answer, where the question fits, and there within tasks."""
        columns, cells = ["score"], []
        for name, which in (("held out", self.half["held out"]), ("all", np.ones(len(self.done), dtype=bool))):
            columns += [name, f"{name}, question fits", f"{name}, within tasks"]
            cells += [(which, False), (which & self.fits, False), (which & self.fits, True)]
        return table(columns, [[n, *(self.cell(s, *cell) for cell in cells)] for n, s in self.main.items()])

    def differences(self) -> list[str]:
        """TSE less each baseline, paired, on the held-out half where the question fits."""
        choose = self.half["held out"] & self.fits
        d, g = self.done[choose], self.tasks[choose]
        if d.all() or not d.any():
            return []
        rows, mine = [], self.main["**TSE**"][choose]
        for name, scores in self.main.items():
            s = scores[choose]
            if name.startswith(BASELINES):
                over = shown(lambda i, s=s: auc(mine[i], d[i]) - auc(s[i], d[i]), len(s), self.resamples)
                within = shown(
                    lambda i, s=s: auc_within(mine[i], d[i], g[i]) - auc_within(s[i], d[i], g[i]),
                    len(s),
                    self.resamples,
                )
                rows.append([name, over, within])
        return table(["AUC of TSE less that of", "held out, question fits", "held out, within tasks"], rows)

    def by_task(self) -> list[str]:
        """TSE by task, over both halves: most tasks have few dialogues whose user said no."""
        rows = []
        for task in sorted(set(self.tasks.tolist())):
            of = self.tasks == task
            no = int((~self.done[of]).sum())
            odd = int((~self.fits[of]).sum())
            rows.append([task, str(int(of.sum())), str(no), str(odd), self.cell(self.main["**TSE**"], of)])
        return table(["task", "dialogues", "said no", "question does not fit", "AUC of TSE"], rows)

    def changes(self) -> list[str]:
        """What each change of the definition gave, on both halves."""
        halves = [self.half[half] for half in HALVES]
        rows = [[n, *(self.cell(s, h & f) for h in halves for f in (h, self.fits))] for n, s in self.path.items()]
        fit = [f"{half}, question fits" for half in HALVES]
        return table(["definition", HALVES[0], fit[0], HALVES[1], fit[1]], rows)

    def answers(self) -> list[str]:
        """Answers against what the customer was told, where the question fits: the disagreement no score can undo."""
        counts: Counter[tuple[str, bool]] = Counter()
        for case in self.found:
            names = [name for name in case.trajectory.goal.subgoals if name.startswith("outcome:")]
            done = sum(name in case.trajectory.completed for name in names)
            state = "all good news" if done == len(names) else "some" if done else "none"
            counts[state, case.done] += case.fits
        states = ("all good news", "some", "none")
        return table(
            ["told in the end", "said yes", "said no"],
            [[s, *(str(counts[s, a]) for a in (True, False))] for s in states],
        )

    def text(self) -> str:
        """The whole page."""
        no, odd = int((~self.done).sum()), int((~self.fits).sum())
        scores = np.round(self.main["**TSE**"], 9)
        ties = (
            float((scores[self.done][:, None] == scores[~self.done][None, :]).mean()) if 0 < no < len(scores) else 0.0
        )
        about = HEAD.format(
            asked=len(self.found), goals=self.goals, no=no, share=no / len(self.found), odd=odd, ties=ties,
            held=int(self.half["held out"].sum()), resamples=self.resamples,
        )  # fmt: skip
        lead = ["\n".join(self.overall()), "\n".join(self.differences())]
        parts = [about, *lead, BY_TASK, "\n".join(self.by_task()), CHANGES]
        return "\n\n".join([*parts, "\n".join(self.changes()), ANSWERS, "\n".join(self.answers()), ""])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main(argv: list[str] | None = None) -> None:
    """Write the page; exit status 2 when the data cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="clone of the STAR repository")
    parser.add_argument("--out", type=Path, default=None, help="the .md file to write; default: print it")
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap resamples of every interval")
    parser.add_argument("--ceiling", action="store_true", help="add a learned classifier (needs scikit-learn)")
    args = parser.parse_args(argv)
    try:
        if args.resamples < 1:
            raise DataError(f"--resamples {args.resamples}: give at least 1")
        page = Page(*cases(args.folder), args.resamples, args.ceiling).text()
        if args.out is None:
            print(page, end="")
        else:
            args.out.write_text(page, encoding="utf-8")
    except (GopoError, OSError) as error:
        print(f"tse_validity: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
