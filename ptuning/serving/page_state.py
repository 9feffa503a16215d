"""What one browser session holds, and what its buttons do. Widgets keep their values in st.session_state, by key."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import page_history as history
import streamlit as st
from page_client import Api, ApiProblem, Model, Sampling, list_models
from page_job import Job
from page_sessions import Sessions
from page_texts import text

from ptuning.language import language

CHAT = "chat"  # in the address: the name of the conversation
RETRY_S = 10.0  # until a server that didn't answer in time is asked again unasked
GONE_S = 5.0  # a browser that connects again within this time keeps its answer going
DEFAULTS = Sampling()
WIDGETS = {
    "compare": False,
    "model_a": None,
    "model_b": None,
    "temperature": DEFAULTS.temperature,
    "top_p": DEFAULTS.top_p,
    "max_tokens": DEFAULTS.max_tokens,
    "seed": None,
    "frequency_penalty": DEFAULTS.frequency_penalty,
    "presence_penalty": DEFAULTS.presence_penalty,
    "system": "",
    "markdown": False,
}


@dataclass
class Session:
    """A conversation. One object, because Streamlit may end a run, a callback too, at any access to st.session_state: what
    belongs together must change without one in between.

    Attributes:
        turns: the conversation.
        jobs: the answers on their way to the last turn, by side.
        changed: set when one of the jobs has something new.
        since: when they were started, and when a run last followed them.
        editing: the index of the turn that is open for editing.
        mistake: the text that says what is wrong in the edit form.
        models: what the API gave last.
        problem: why it gave none.
        asked: when it was asked last.
        stopped: whether an answer was stopped since: its server may hang, and nothing must wait for it.
        settings: the widgets' values, for the next connection.
    """

    turns: list[history.Turn] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    changed: threading.Event = field(default_factory=threading.Event)
    since: float = 0.0
    followed: float = 0.0
    editing: int | None = None
    mistake: str = ""
    models: list[Model] = field(default_factory=list)
    problem: ApiProblem | None = None
    asked: float = 0.0
    stopped: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def hangs(self) -> bool:
        """Whether the API didn't answer in time a short while ago."""
        late = self.problem is not None and self.problem.kind == "timeout"
        return late and time.monotonic() - self.asked < RETRY_S

    def stop(self) -> None:
        """Ends the answers on their way. What came of them becomes part of the turns."""
        for job in self.jobs.values():
            job.stop()
        self.take_answers()

    def take_answers(self) -> None:
        """Puts what the jobs have brought among the turns."""
        for side, job in self.jobs.items():
            cut = "problem" if job.problem else "length" if job.finish == "length" else ""
            if job.stopped and not job.finish:
                cut = "stopped"
            problem = (job.problem.kind, job.problem.fields) if job.problem else None
            reply = history.Reply(job.text, job.model, cut, dropped=job.dropped, problem=problem)
            self.turns = history.with_reply(self.turns, len(self.turns) - 1, side, reply)
        self.jobs = {}

    def stop_unless_followed(self) -> None:
        """Stops the jobs a little later, unless a run follows them again by then: the tab was closed, and the server
        has better things to do; or its connection only blinked."""

        def look() -> None:
            if time.monotonic() - self.followed > GONE_S:
                for job in list(self.jobs.values()):
                    job.stop()

        timer = threading.Timer(GONE_S + 0.5, look)
        timer.daemon = True
        timer.start()


_sessions: Sessions[Session] = Sessions()


def prepare() -> None:
    """Fills in what a new connection lacks, from its conversation where the page was loaded anew.

    Raises:
        ConfigError: PTUNING_LANG is no language of ours.
    """
    state, defaults = st.session_state, {**WIDGETS, "language": language()}
    if "session" not in state:
        session = _sessions.find(st.query_params.get(CHAT))
        if session is None:
            session = Session()
            st.query_params[CHAT] = _sessions.add(session)
        state.session = session
    for name, value in defaults.items():
        state.setdefault(name, state.session.settings.get(name, value))
    state.session.settings = {name: state[name] for name in defaults}


def current() -> Session:
    """This browser session's conversation."""
    return st.session_state.session


def say(name: str, **fields: object) -> str:
    """A text in the session's language."""
    return text(st.session_state.language, name, **fields)


def sampling() -> Sampling:
    """The settings of the sidebar."""
    state = st.session_state
    return Sampling(
        temperature=state.temperature,
        top_p=state.top_p,
        max_tokens=state.max_tokens or DEFAULTS.max_tokens,
        seed=state.seed,
        frequency_penalty=state.frequency_penalty,
        presence_penalty=state.presence_penalty,
    )


def names() -> list[str]:
    """Of the models that can be chosen."""
    return [model.name for model in current().models]


def load_models() -> ApiProblem | None:
    """Reads the models' names and chooses where nothing is chosen, or what was is gone: the newest prefix, and the first of
    the others to compare with. Keeps the names that it had where the API can't be asked, and doesn't wait for one that hangs at
    each click."""
    state, session = st.session_state, current()
    if not (session.models and session.stopped) and not session.hangs:
        try:
            session.models, session.problem = list_models(Api.from_environment()), None
        except ApiProblem as found:
            session.problem = found
        session.asked = time.monotonic()
    session.stopped = False
    newest = max(session.models, key=lambda model: model.saved, default=Model(""))
    others = [name for name in names() if name != newest.name]
    for key, choice in (("model_a", newest.name), ("model_b", next(iter(others), newest.name))):
        if state[key] not in names():
            state[key] = choice or None
    return session.problem


def connect_again() -> None:
    """The button beside a problem: ask now."""
    current().problem = None


def ask(question: str, before: history.Turns) -> None:
    """Asks the chosen model, or both, after these turns. The turns that are not among them are dropped."""
    state, session, settings = st.session_state, current(), sampling()
    system, chosen = state.system, {"a": state.model_a} | ({"b": state.model_b} if state.compare else {})
    session.stop()
    session.changed, session.editing = threading.Event(), None
    session.since = session.followed = time.monotonic()
    session.turns = [*before, history.Turn(question)]
    session.jobs = {
        side: Job(
            Api.from_environment(), model, history.messages(before, side, question, system), settings, session.changed
        )
        for side, model in chosen.items()
    }


def ask_typed() -> None:
    """The chat input was sent."""
    question, session = st.session_state.typed, current()
    if question and question.strip():
        session.stop()
        ask(question, session.turns)


def ask_again(index: int) -> None:
    """A new answer to a turn's question."""
    turns = current().turns
    ask(turns[index].question, turns[:index])


def stop() -> None:
    """The stop button."""
    current().stop()
    current().stopped = True


def clear() -> None:
    """Forgets the conversation; the settings stay."""
    session = current()
    session.stop()
    session.turns, session.editing = [], None


def delete(index: int) -> None:
    """Takes a turn out."""
    session = current()
    session.turns, session.editing = history.without(session.turns, index), None


def edit(index: int | None) -> None:
    """Opens a turn for editing, or closes the one that is open."""
    session = current()
    session.editing, session.mistake = index, ""


def save(index: int, then_ask: bool) -> None:
    """Takes over the texts of the edit form."""
    state, session = st.session_state, current()
    question = state[f"question_{index}"]
    if not question.strip():
        session.mistake = "empty_question"
        return
    if then_ask:
        ask(question, session.turns[:index])
        return
    turns = history.with_question(session.turns, index, question)
    for side in turns[index].replies:
        turns = history.edited(turns, index, side, state[f"answer_{index}_{side}"])
    session.turns, session.editing = turns, None
