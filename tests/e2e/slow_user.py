"""A customer who takes a moment for every utterance, as people and remote models do."""

import time

from openrlhf_gopo.users.base import Cue, UserSimulator

SECONDS = 0.5


class Slow(UserSimulator):
    """Says what the environment drafted, after a while."""

    blocking = True

    def say(self, cue: Cue) -> str:
        time.sleep(SECONDS)
        return cue.draft
