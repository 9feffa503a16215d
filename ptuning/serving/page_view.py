"""How the conversation looks: the turns, the form that edits one, and the answers on their way."""

import time

import page_history as history
import page_state as page
import streamlit as st
from page_texts import as_literal, as_safe_markdown, problem_text
from streamlit.runtime.scriptrunner import StopException

TICK_S = 0.2  # the longest that a click waits while nothing comes from the server

Places = dict[str, st.delta_generator.DeltaGenerator]


def draw_turns() -> Places:
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


def follow(places: Places, status: st.delta_generator.DeltaGenerator) -> None:
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
    session.settle()


def show_problem(kind: str, fields: dict) -> None:
    """A red box with the problem in words."""
    st.error(as_literal(problem_text(st.session_state.language, kind, fields)), icon=":material/error:")


def _draw_reply(reply: history.Reply) -> None:
    if reply.text:
        _answer(st, reply.text)
    elif not reply.problem:
        st.caption(page.say("no_answer"))
    if reply.problem:
        show_problem(*reply.problem)
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
        given = {"type": "tertiary", "disabled": off, "args": (index,)}
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
        if fault := page.current().fault:
            st.error(page.say(fault))
        st.caption(page.say("save_help"))
        with st.container(horizontal=True, gap="small"):
            st.form_submit_button(
                page.say("save"), key=f"save_{index}", type="primary", on_click=page.save, args=(index, False)
            )
            st.form_submit_button(page.say("save_ask"), key=f"ask_{index}", on_click=page.save, args=(index, True))
            st.form_submit_button(page.say("cancel"), key=f"cancel_{index}", on_click=page.edit, args=(None,))
