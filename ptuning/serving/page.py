"""The web page: a client of the API that holds no model. This file lays it out; Streamlit runs it anew at every click.

    PTUNING_API=http://127.0.0.1:7030 streamlit run ptuning/serving/page.py

`page_command` in server.py is the command line with the options that it should run with.
"""

import time
from typing import Any, Literal

import page_history as history
import page_state as page
import streamlit as st
from page_texts import LANGUAGES, as_literal, as_safe_markdown, problem_text
from streamlit.runtime.scriptrunner import StopException

from ptuning.errors import ConfigError

TICK_S = 0.2  # the longest that a click waits while nothing comes from the server

Places = dict[str, st.delta_generator.DeltaGenerator]

# Streamlit's own sign that the script runs has a Stop that only ends the script; ours stops the answer. Deploy would give the
# page to a service in the internet; where page_command didn't start it, nothing else hides that.
_STYLE = "<style>[data-testid=stStatusWidget], [data-testid=stAppDeployButton] {display: none}</style>"


def _sidebar() -> None:
    state, models = st.session_state, page.names()
    with st.sidebar:
        st.radio(
            "语言 / Language",
            list(LANGUAGES),
            format_func=LANGUAGES.get,
            key="language",
            horizontal=True,
            label_visibility="collapsed",
        )
        st.selectbox(page.say("model"), models, key="model_a", disabled=not models)
        st.toggle(page.say("compare"), key="compare", help=page.say("compare_help"))
        # Drawn always: a widget that one run leaves out forgets its value.
        st.selectbox(page.say("model_b"), models, key="model_b", disabled=not (models and state.compare))
        st.text_area(page.say("system"), key="system", help=page.say("system_help"), height=80)
        _sampling()
        st.toggle(page.say("markdown"), key="markdown", help=page.say("markdown_help"))
        _downloads()


def _sampling() -> None:
    st.markdown(f"**{page.say('sampling')}**")
    st.slider(page.say("temperature"), 0.0, 2.0, step=0.05, key="temperature")
    st.slider(page.say("top_p"), 0.05, 1.0, step=0.05, key="top_p")
    st.number_input(page.say("max_tokens"), 1, 32768, step=64, key="max_tokens")
    st.number_input(page.say("seed"), 0, 2**31 - 1, None, step=1, key="seed", placeholder=page.say("seed_empty"))
    with st.expander(page.say("more")):
        st.slider(page.say("frequency_penalty"), -2.0, 2.0, step=0.1, key="frequency_penalty")
        st.slider(page.say("presence_penalty"), -2.0, 2.0, step=0.1, key="presence_penalty")


def _downloads() -> None:
    state, turns = st.session_state, page.current().turns
    st.markdown(f"**{page.say('history')}**")
    settings = {
        "model_a": state.model_a,
        "model_b": state.model_b if state.compare else None,
        **page.sampling().fields(),
    }
    st.download_button(
        page.say("download_chat"),
        history.as_json(turns, state.system, settings),
        "chat.json",
        "application/json",
        key="download_chat",
        on_click="ignore",
        disabled=not turns,
        width="stretch",
    )
    for side, label in zip(history.SIDES, ("download_rows", "download_rows_b"), strict=True):
        rows = history.training_rows(turns, side)
        if side == "a" or any(side in turn.replies for turn in turns):
            st.download_button(
                page.say(label, rows=len(rows)),
                history.as_json_lines(rows),
                f"train_{side}.jsonl",
                "application/jsonl",
                key=f"download_rows_{side}",
                help=page.say("rows_help"),
                on_click="ignore",
                disabled=not rows,
                width="stretch",
            )
    st.button(page.say("clear"), key="clear", on_click=page.clear, disabled=not turns, width="stretch")


def _draw_turns() -> Places:
    """Draws the conversation. Returns the empty places for the answers on their way, by side."""
    session = page.current()
    places: Places = {}
    for index, turn in enumerate(session.turns):
        is_last = index == len(session.turns) - 1
        live = session.jobs if is_last else {}
        with st.container(key=f"turn_{index}"):
            if session.editing == index and not session.jobs:
                _edit_form(index, turn)
                continue
            with st.chat_message("user"):
                _literal(st, turn.question)
            sides = sorted({*turn.replies, *live})
            for side, column in zip(
                sides, st.columns(len(sides)) if len(sides) > 1 else [st.container()], strict=False
            ):
                with column, st.chat_message("assistant"):
                    if side in live:
                        places[side] = st.empty()
                        st.caption(as_literal(live[side].model))
                    else:
                        _draw_reply(turn.replies[side])
            if not live:
                _buttons(index, is_last, off=bool(session.jobs))
    return places


def _follow(places: Places, status: st.delta_generator.DeltaGenerator) -> None:
    """Shows the answers as they come, until all are complete.

    A click ends this run at one of the drawing calls; the jobs go on and the next run follows them further, unless the
    click was the stop button. A browser that goes away ends it too, and there may be no next run.
    """
    session = page.current()
    shown: dict[str, str] = {}
    try:
        while True:
            session.followed = time.monotonic()
            finished = all(job.done for job in session.jobs.values())
            for side, job in session.jobs.items():
                body = job.text or "…"
                if shown.get(side) != body:
                    shown[side] = body
                    _answer(places[side], body)
            begun = any(job.text for job in session.jobs.values())
            seconds = int(time.monotonic() - session.since)
            status.caption(page.say("answering" if begun else "waiting", seconds=seconds))
            if finished:
                break
            session.changed.wait(TICK_S)
            session.changed.clear()
    except StopException:
        session.stop_unless_followed()
        raise
    session.take_answers()


def _show_problem(kind: str, fields: dict) -> None:
    """A red box with the problem in words."""
    st.error(as_literal(problem_text(st.session_state.language, kind, fields)), icon=":material/error:")


def _draw_reply(reply: history.Reply) -> None:
    if reply.text:
        _answer(st, reply.text)
    elif not reply.problem:
        st.caption(page.say("no_answer"))
    if reply.problem:
        _show_problem(*reply.problem)
    notes = [reply.model]
    if reply.edited:
        notes.append(page.say("edited"))
    elif reply.cut and not (reply.problem and not reply.text):
        notes.append(page.say("cut_problem" if reply.cut == "problem" else reply.cut))
    if reply.dropped:
        notes.append(page.say("dropped", turns=reply.dropped))
    st.caption(as_literal(" · ".join(notes)))


def _answer(place, body: str) -> None:
    if st.session_state.markdown:
        place.markdown(as_safe_markdown(body))
    else:
        _literal(place, body)


def _literal(place, body: str) -> None:
    """Text as it is: a row like 类型#上衣*材质#牛仔布*颜色#白色 must not lose its stars, nor <b> become bold."""
    place.text(body, width="stretch")


def _buttons(index: int, is_last: bool, off: bool) -> None:
    with st.container(horizontal=True, gap="small", key=f"buttons_{index}"):
        given: dict[str, Any] = {"type": "tertiary", "disabled": off, "args": (index,)}
        st.button(page.say("edit"), key=f"edit_{index}", icon=":material/edit:", on_click=page.edit, **given)
        if is_last:
            icon = ":material/refresh:"
            st.button(page.say("again"), key=f"again_{index}", icon=icon, on_click=page.ask_again, **given)
        st.button(page.say("delete"), key=f"delete_{index}", icon=":material/delete:", on_click=page.delete, **given)


def _edit_form(index: int, turn: history.Turn) -> None:
    with st.form(f"form_{index}"):
        st.text_area(page.say("question"), turn.question, key=f"question_{index}")
        for side, reply in sorted(turn.replies.items()):
            label = page.say("answer_of", model=as_literal(reply.model))
            st.text_area(label, reply.text, key=f"answer_{index}_{side}", height=160)
        if mistake := page.current().mistake:
            st.error(page.say(mistake))
        st.caption(page.say("save_help"))
        with st.container(horizontal=True, gap="small"):
            st.form_submit_button(
                page.say("save"), key=f"save_{index}", type="primary", on_click=page.save, args=(index, False)
            )
            st.form_submit_button(page.say("save_ask"), key=f"ask_{index}", on_click=page.save, args=(index, True))
            st.form_submit_button(page.say("cancel"), key=f"cancel_{index}", on_click=page.edit, args=(None,))


def _main() -> None:
    try:
        page.prepare()
    except ConfigError as error:
        st.error(as_literal(str(error)))
        return
    session = page.current()
    layout: Literal["wide", "centered"] = "wide" if st.session_state.compare else "centered"
    st.set_page_config(page_title=page.say("title"), page_icon="💬", layout=layout)
    problem = None if session.jobs else page.load_models()
    _sidebar()
    st.html(_STYLE)
    st.subheader(page.say("title"), anchor=False)
    if problem:
        _show_problem(problem.kind, problem.fields)
        st.button(page.say("reload"), key="reload", icon=":material/refresh:", on_click=page.connect_again)
    elif not session.models:
        st.warning(page.say("no_models"))
    elif not session.turns:
        st.caption(page.say("welcome"))
    places = _draw_turns()
    if session.jobs:
        # A click on this button ends the run below; its callback closes the connections.
        with st.bottom, st.container(horizontal=True, vertical_alignment="center", key="status"):
            st.button(page.say("stop"), key="stop", type="primary", icon=":material/stop_circle:", on_click=page.stop)
            status = st.empty()
    off = bool(session.jobs) or not session.models
    # Not inside st.bottom, where it comes to lie anyway: only from here does it make the page scroll along.
    st.chat_input(page.say("ask"), key="typed", on_submit=page.ask_typed, disabled=off)
    if session.jobs:
        _follow(places, status)
        st.rerun()


_main()
