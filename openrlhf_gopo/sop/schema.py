"""The form of an SOP file. Every model has the fields of the dataclass it builds (``Strategy``, ``Rule``, ``Part``,
``Sop``), with lists for tuples; an SOP file is one ``SopModel``. ``json_schema`` publishes it, for editors and others.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

# Ids and facts are words: the shell command and the messages list them with spaces and commas between.
# No controls in either: both are printed, and stand in prompts.
Id = Annotated[str, StringConstraints(pattern=r"^[^\s,\x00-\x1f\x7f-\x9f]+$")]
_SEEN = r"[^\x00-\x08\x0b-\x1f\x7f-\x9f]*"
Text = Annotated[str, StringConstraints(pattern=rf"^{_SEEN}[^\s\x00-\x1f\x7f-\x9f]{_SEEN}$")]


class _Model(BaseModel):
    # strict: YAML reads an unquoted yes, 1 or 2026-01-01 as something else than text; say so, do not convert.
    model_config = ConfigDict(extra="forbid", strict=True)


class StrategyModel(_Model):
    """One entry of the catalogue that the expert chooses from."""

    id: Id
    name: Text = Field(description="Shown to the models")
    description: Text = Field(description="Shown to the models")
    asks: list[Id] = Field([], description="Facts it requests from the user; its answer makes them known")
    gives: list[Id] = Field([], description="Facts it tells the user")
    does: list[Id] = Field([], description="Actions it performs")


class RuleModel(_Model):
    """Conditions on one strategy. All of them, and all rules on the strategy, must hold."""

    strategy: Id = Field(description="The strategy that the rule limits")
    requires_facts: list[Id] = Field([], description="Facts that must be known")
    without_facts: list[Id] = Field([], description="Facts that must not be known: do not ask what is known")
    after: list[Id] = Field([], description="Strategies that must all have been used")
    after_any: list[Id] = Field([], description="Strategies of which at least one must have been used")
    not_after: list[Id] = Field([], description="Strategies of which none may have been used")
    max_uses: Annotated[int, Field(ge=1)] | None = Field(None, description="Uses per dialogue at most")
    no_repeat: bool = Field(False, description="Not twice in a row")


class PartModel(_Model):
    """What changes for one intent."""

    name: Id
    strategies: list[Id] = Field([], description="The strategies offered; none listed: all")
    rules: list[RuleModel] = Field([], description="Rules on top of the general ones")
    mandatory: list[Id] = Field([], description="Mandatory strategies on top of the general ones")


class SopModel(_Model):
    """A catalogue of strategies and the rules that give the allowed ones of every turn."""

    name: Id
    strategies: list[StrategyModel] = Field(min_length=1, description="In the order in which they are offered")
    facts: list[Id] = Field([], description="The facts that rules may use; none listed: any")
    rules: list[RuleModel] = []
    terminal: list[Id] = Field([], description="Strategies that end the dialogue")
    mandatory: list[Id] = Field([], description="Strategies to use before a terminal one")
    parts: list[PartModel] = Field([], description="One for each intent or desk that changes something")


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of an SOP file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **SopModel.model_json_schema()}


def fields_at(place: tuple[str | int, ...]) -> list[str]:
    """The field names of the mapping at ``place`` of a file."""
    models: dict[object, type[BaseModel]] = {"strategies": StrategyModel, "rules": RuleModel, "parts": PartModel}
    words = [word for word in place if isinstance(word, str)]
    return list(models.get(words[-1] if words else None, SopModel).model_fields)
