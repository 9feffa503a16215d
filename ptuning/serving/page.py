"""The web page: a client of the API that holds no model. This file lays it out; Streamlit runs it anew at every click.

    PTUNING_API=http://127.0.0.1:7030 streamlit run ptuning/serving/page.py

page_start.py has the command line with the options that it should run with.
"""

import page_history as history
import page_state as page
import page_view as view
import streamlit as st
from page_texts import LANGUAGES

# Streamlit's own sign that the script runs has a Stop that only ends the script; ours stops the answer.
_STYLE = "<style>[data-testid=stStatusWidget] {display: none}</style>"


def _sidebar() -> None:
    state, models = st.session_state, page.current().models
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


def _main() -> None:
    page.prepare()
    session, layout = page.current(), "wide" if st.session_state.compare else "centered"
    st.set_page_config(page_title=page.say("title"), page_icon="💬", layout=layout)
    problem = None if session.jobs else page.load_models()
    _sidebar()
    st.html(_STYLE)
    st.subheader(page.say("title"), anchor=False)
    if problem:
        view.show_problem(problem.kind, problem.fields)
        st.button(page.say("reload"), key="reload", icon=":material/refresh:")
    elif not session.models:
        st.warning(page.say("no_models"))
    elif not session.turns:
        st.caption(page.say("welcome"))
    places = view.draw_turns()
    if session.jobs:
        # A click on this button ends the run below; its callback closes the connections.
        with st.bottom, st.container(horizontal=True, vertical_alignment="center", key="status"):
            st.button(page.say("stop"), key="stop", type="primary", icon=":material/stop_circle:", on_click=page.stop)
            status = st.empty()
    off = bool(session.jobs) or not session.models
    # Not inside st.bottom, where it comes to lie anyway: only from here does it make the page scroll along.
    st.chat_input(page.say("ask"), key="typed", on_submit=page.ask_typed, disabled=off)
    if session.jobs:
        view.follow(places, status)
        st.rerun()


_main()
