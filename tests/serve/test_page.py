"""The chat page in a real browser, with the keyboard alone; at the width of a desk and of a phone, light and dark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chromium import PROGRAM, Page, browser
from tests.support.serving import Running, serving

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(rows=2) as found:
        yield found


@pytest.fixture(scope="module")
def page(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        found.size(1200, 800)
        come(found, running)
        yield found


def come(page: Page, running: Running) -> None:
    """To the page of a server."""
    page.call("Page.navigate", url=running.url)
    page.wait("document.querySelector('h1') && document.querySelector('h1').textContent === 'mistral-bundled'")
    page.said.clear()


def ask(page: Page, question: str, most: int = 40) -> None:
    page.run(f"$('max_tokens').value = {most}; $('seed').value = 1; $('temperature').value = 0; $('question').focus()")
    page.type(question)
    page.press("Enter")


@pytest.fixture
def asked(page: Page) -> Page:
    page.run("$('clear').click()")
    ask(page, "Tell me of the <b>king</b> and his three daughters.")
    page.wait("!running && document.querySelectorAll('.assistant .token').length === 40")
    return page


def test_a_question_is_answered(asked: Page) -> None:
    assert asked.run("turns[1].content.length") > 20
    status = asked.run("$('status').textContent")
    assert "tokens/s" in status
    assert status.endswith("ended at the most tokens (see Settings)")
    assert "window 64, 6 layers" in asked.run("$('window').textContent")
    assert asked.run("document.querySelectorAll('main b').length") == 0
    assert asked.said == []
    assert asked.run("document.activeElement.id") == "question"


def test_tokens_show_their_alternatives_to_the_keyboard(asked: Page) -> None:
    asked.run("document.querySelector('.token').focus()")
    asked.press("ArrowRight")
    assert not asked.run("$('tip').hidden")
    assert asked.run("$('tip').querySelectorAll('tr').length") >= 5
    assert "(chosen)" in asked.run("$('tip').textContent")


def test_the_end_of_an_answer_leaves_a_reader_where_they_are(page: Page) -> None:
    """Positions are asked for once more after the last token, and all is drawn again: here not before it may."""
    late = "(async (...a) => { await window.may; return window.at_once(...a); })"
    page.run("$('clear').click(); window.at_once = window.fetch; window.may = new Promise(f => window.let = f); 0")
    ask(page, "Tell me of the king.", 20)
    page.run(f"window.fetch = (u, ...a) => (String(u).endsWith('/tokenize') ? {late} : window.at_once)(u, ...a); 0")
    page.wait("document.querySelectorAll('.token').length === 20")
    page.run("document.querySelectorAll('.token')[3].focus()")
    assert page.run("running !== null")
    page.run("window.let(); 0")
    page.wait("running === null")
    page.run("window.fetch = window.at_once; 0")
    assert page.run("[...document.querySelectorAll('.token')].indexOf(document.activeElement)") == 3
    assert not page.run("$('tip').hidden")


def test_what_the_window_no_longer_sees_is_marked(asked: Page) -> None:
    ask(asked, "And then?", 60)
    asked.wait("!running && turns.length === 4")
    asked.wait("document.querySelectorAll('article.beyond').length > 0")
    assert "beyond the window" in asked.run("document.querySelector('article').textContent")


def test_escape_stops_and_retry_answers_again(page: Page, running: Running) -> None:
    page.run("$('clear').click()")
    ask(page, "Tell me a long story.", 100_000)
    page.wait("document.querySelectorAll('.token').length > 3")
    page.press("Escape")
    page.wait("!running && $('status').textContent.includes('stopped')")
    before = page.run("turns[1].content")
    assert before
    page.run("$('max_tokens').value = 5; document.querySelector('.assistant button').click()")
    page.wait("!running && turns.length === 2 && turns[1].tokens.length === 5")
    page.run("document.querySelector('.user button').click()")
    assert page.run("$('question').value") == "Tell me a long story."
    assert page.run("turns.length") == 0


def test_what_fails_leaves_what_there_was(asked: Page) -> None:
    """A question goes back to where it was typed; an answer that is not made anew stays."""
    before = asked.run("JSON.stringify(turns.map(t => [t.role, t.content]))")
    asked.run("window.real = window.fetch; window.fetch = () => Promise.reject(new TypeError('Failed to fetch')); 0")
    ask(asked, "And then?")
    asked.wait("!running && $('status').classList.contains('error')")
    assert "does not answer" in asked.run("$('status').textContent")
    assert asked.run("$('question').value") == "And then?"
    asked.run("$('question').value = ''; document.querySelector('.assistant button').click()")
    asked.wait("!running")
    assert asked.run("JSON.stringify(turns.map(t => [t.role, t.content]))") == before
    asked.run("window.fetch = window.real; 0")
    ask(asked, "x " * 3000, 10**7)
    asked.wait("!running && $('status').textContent.includes('positions')")
    assert asked.run("[turns.length, $('question').value.length]") == [2, 6000]
    asked.run("$('question').value = ''")


def test_a_setting_is_sent_as_it_is_or_refused(page: Page) -> None:
    """Also one that is off the steps of its arrows; while Settings are closed a browser would refuse to send it."""
    page.run("$('clear').click(); $('question').value = ''; $('max_tokens').value = 3; $('seed').value = 1")
    page.run("$('top_p').value = '0.93'; $('min_p').value = '0.005'; $('question').focus()")
    page.type("Who is there?")
    page.click("$('send')")
    page.wait("!running && turns.length === 2 && turns[1].tokens.length === 3")
    for field, text, why in (
        ("temperature", "1e", "Temperature is not a number"),
        ("seed", "9007199254740993", "Seed must be a whole number below 2**53"),
        ("max_tokens", "2.5", "Most tokens must be a whole number below 2**53"),
    ):
        page.run(f"$('settings').open = true; window.was = $('{field}').value; $('{field}').select(); 0")
        page.type(text)
        page.run("$('settings').open = false; $('question').value = 'And then?'; send(); 0")
        page.wait("!running")
        assert page.run("[$('status').textContent, turns.length, $('question').value]") == [why, 2, "And then?"]
        assert page.run("document.activeElement.id") == field
        page.run(f"$('{field}').value = window.was; $('settings').open = false; 0")
    page.run("$('top_p').value = 0.8; $('min_p').value = 0; $('question').value = ''; 0")


def test_a_question_waits_until_it_is_known_what_is_served(page: Page) -> None:
    """As raw text, without the template, a model would answer it worse, and nobody would see why."""
    page.run("$('clear').click(); delete $('model').dataset.id; delete $('model').dataset.chat; 0")
    page.run("window.real = window.fetch; window.asked = []; 0")
    page.run("window.fetch = (u, ...a) => { asked.push(String(u)); return real(u, ...a); }; 0")
    ask(page, "Who is there?", 3)
    page.wait("!running && turns.length === 2")
    page.run("window.fetch = window.real; 0")
    assert page.run("asked.slice(0, 2)") == ["/v1/models", "/v1/chat/completions"]


def test_another_model_at_the_same_address(page: Page) -> None:
    """The first question is refused, as it was for the other one; the next one is answered."""
    page.run("$('clear').click(); $('model').dataset.id = 'gone'; 0")
    ask(page, "Who is there?", 3)
    page.wait("!running && $('status').textContent.includes(\"'gone' is not here\")")
    page.press("Enter")
    page.wait("!running && turns.length === 2")


FAKE = """
window.real = window.fetch;
window.fetch = async (u, ...a) => String(u).endsWith('completions') ? new Response(new ReadableStream({start: c => {
  window.send_part = text => c.enqueue(new TextEncoder().encode(text));
  window.end_parts = () => c.close();
}})) : real(u, ...a);
window.part = (text, finish, kind) => 'data: ' + JSON.stringify({choices: [{index: 0, finish_reason: finish || null,
  delta: {[kind || 'content']: text}, logprobs: {content: [
    {token: text, bytes: [...new TextEncoder().encode(text)], logprob: -1, top_logprobs: []}]}}]}) + '\\r\\n\\r\\n';
0
"""


@pytest.fixture
def fed(page: Page) -> Iterator[Page]:
    """A page that has asked, and takes what `send_part` sends for the answer."""
    page.run("$('clear').click()")
    page.run(FAKE)
    ask(page, "Who is there?")
    page.wait("typeof send_part === 'function'")
    yield page
    page.run("window.fetch = window.real; delete window.send_part; 0")


def reload(page: Page) -> None:
    page.run("window.before = true")
    page.call("Page.reload")
    page.wait(
        "!window.before && document.querySelector('h1') && document.querySelector('h1').textContent !== 'Loading'"
    )


def test_a_reload_keeps_what_there_was(asked: Page) -> None:
    was = asked.run("JSON.stringify(turns.map(t => [t.role, t.content]))")
    ends = asked.run("turns.map(t => t.end)")
    asked.run("$('system').value = 'Be <b>kind</b>.'; $('min_p').value = '0.005'; 0")
    asked.run("$('question').value = 'And'; $('key').value = 'x'")
    reload(asked)
    assert asked.run("JSON.stringify(turns.map(t => [t.role, t.content]))") == was
    assert asked.run("['system', 'min_p', 'question', 'key'].map(id => $(id).value)") == [
        "Be <b>kind</b>.",
        "0.005",
        "And",
        "",
    ]
    asked.run("$('system').value = ''; $('min_p').value = 0; $('question').value = ''; 0")
    ask(asked, "And then?", 3)
    asked.wait("!running && turns.length === 4 && turns[3].tokens.length === 3")
    assert asked.run("turns.slice(0, 2).map(t => t.end)") == ends
    asked.run("$('clear').click()")
    reload(asked)
    assert asked.run("turns.length") == 0


def test_a_reload_within_an_answer(fed: Page) -> None:
    """What has come of it stays; where nothing has, the question is back where it was typed."""
    reload(fed)
    assert fed.run("[turns.length, $('question').value]") == [0, "Who is there?"]
    fed.run(FAKE)
    fed.press("Enter")
    fed.wait("typeof send_part === 'function'")
    fed.run("send_part(part('The king', null)); send_part(part('Hm.', null, 'reasoning_content')); 0")
    fed.wait("turns[1].thought")
    reload(fed)
    assert fed.run("turns.map(t => t.content)") == ["Who is there?", "The king"]
    assert fed.run("document.querySelector('.assistant .thought').textContent") == "Hm."
    fed.run("window.real = window.fetch")


def test_an_answer_that_is_cut_off_does_not_look_whole(fed: Page) -> None:
    fed.run("send_part(part('The king')); end_parts()")
    fed.wait("!running")
    assert fed.run("[turns[1].content, $('status').textContent]") == ["The king", "the server has gone before the end"]


def test_who_has_scrolled_up_stays_there(fed: Page) -> None:
    fed.run("for (let i = 0; i < 200; i++) send_part(part('Line\\n')); 0")
    fed.wait("document.querySelectorAll('.token').length === 200")
    assert fed.run("low($('log')) && $('log').scrollTop > 1000")  # it follows
    fed.run("$('log').scrollTop = 100; send_part(part('.', 'stop') + 'data: [DONE]\\n'); 0")
    fed.wait("!running")
    assert fed.run("$('log').scrollTop") == 100
    ask(fed, "And then?")
    assert fed.run("low($('log'))")
    fed.press("Escape")
    fed.run("end_parts()")
    fed.wait("!running")


def test_who_hears_the_page_hears_each_line_once(fed: Page) -> None:
    fed.call("Accessibility.enable")
    found = fed.call("Accessibility.getFullAXTree")["nodes"]
    names = {node["name"]["value"] for node in found if node["role"].get("value") == "textbox"}
    assert "Message" in names
    assert fed.run("[$('send'), $('clear'), ...document.querySelectorAll('article button')].every(b => b.disabled)")
    fed.run("for (const text of ['The', ' king.\\n', 'And', ' his', ' son.']) send_part(part(text)); 0")
    fed.wait("$('spoken').children.length === 1")
    fed.run("send_part(part(' End.', 'stop')); send_part('data: [DONE]\\r\\n')")
    fed.wait("!running")
    heard = fed.run("[...$('spoken').children].map(p => p.textContent)")
    assert heard[:2] == ["The king.\n", "And his son. End."]
    assert [text.partition(" ")[2][:6] for text in heard[2:]] == ["tokens"]
    live = "[...document.querySelectorAll('[aria-live], [role=status], [role=log]')].map(e => e.id)"
    assert fed.run(live) == ["spoken"]
    assert not fed.run("[$('send'), $('clear'), ...document.querySelectorAll('article button')].some(b => b.disabled)")


def test_a_long_answer_is_not_laid_out_at_each_token(fed: Page) -> None:
    fed.run("window.grown = 0; window.at_first = grow; grow = turn => { grown += 1; at_first(turn); }; 0")
    fed.run("for (let i = 0; i < 1500; i++) send_part(part(' ' + i)); 0")
    fed.run("send_part(part('.', 'stop') + 'data: [DONE]\\n'); 0")
    fed.wait("!running")
    fed.run("grow = window.at_first; 0")
    assert fed.run("document.querySelectorAll('.token').length") == 1501
    assert fed.run("grown") < 750


def test_characters_of_several_tokens_and_scripts_from_right_to_left(page: Page) -> None:
    assert page.run(r"bytesOf('bytes:\\xf0\\x9f')") == [0xF0, 0x9F]
    assert page.run("bytesOf('é')") == [0xC3, 0xA9]
    assert page.run("bytesOf('token_id:7')") is None
    page.run("turns.push({role: 'user', content: 'مرحبا (a).\\nb'}); draw()")
    assert page.run("getComputedStyle(document.querySelector('.text')).unicodeBidi") == "plaintext"
    page.run("turns.length = 0; draw()")


def test_positions_follow_the_system_prompt(asked: Page) -> None:
    ends = asked.run("turns.map(t => t.end)")
    asked.run("$('system').value = 'Answer as a king would.'")
    ask(asked, "Who is there?", 5)
    asked.wait("!running && turns.length === 4")
    moved = asked.run("turns.map(t => t.end)")
    assert moved[0] > ends[0] + 5
    assert [b - a for a, b in zip(ends, moved, strict=False)] == [moved[0] - ends[0]] * 2
    asked.run("$('system').value = ''")


def test_with_the_mouse_and_a_system_prompt(page: Page) -> None:
    page.run("$('clear').click(); $('question').value = ''")
    ask(page, "Who is there?", 5)
    page.wait("!running && turns.length === 2")
    plain = page.run("Number(/(\\d+) prompt tokens/.exec($('status').textContent)[1])")
    page.click("$('clear')")
    page.click("document.querySelector('summary')")
    page.click("$('system')")
    page.type("Answer as a king would.")
    page.run("$('max_tokens').value = 100000; $('question').focus()")
    page.type("Who is there?")
    page.click("$('send')")
    page.wait("document.querySelectorAll('.token').length > 3")
    page.point("document.querySelectorAll('.token')[1]")
    page.wait("!$('tip').hidden && $('tip').textContent.includes('(chosen)')")
    page.click("$('stop')")
    page.wait("!running && $('status').textContent.includes('stopped')")
    page.run("$('max_tokens').value = 5; document.querySelector('.assistant button').click()")
    page.wait("!running && turns[1].tokens.length === 5")
    assert page.run("Number(/(\\d+) prompt tokens/.exec($('status').textContent)[1])") > plain + 5
    page.run("$('system').value = ''; document.querySelector('details').open = false")


@pytest.mark.parametrize(("width", "height", "dark"), [(1200, 800, False), (390, 844, True)])
def test_it_fits(asked: Page, tmp_path: Path, width: int, height: int, dark: bool) -> None:
    asked.size(width, height, dark=dark)
    assert asked.run("document.documentElement.scrollWidth") <= width
    assert asked.run("$('send').getBoundingClientRect().bottom") <= height
    back, text = asked.run("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert (sum(map(int, back[4:-1].split(","))) < sum(map(int, text[4:-1].split(",")))) == dark
    asked.run("$('shade').checked || $('shade').click(); document.querySelectorAll('.token')[9].focus()")
    asked.picture(Path(os.environ.get("PICTURES", tmp_path)) / f"chat-{width}.png")
    asked.size(1200, 800)


def test_a_short_context_leaves_room_for_a_question(page: Page, running: Running) -> None:
    with serving(rows=1, most=60) as short:
        come(page, short)
        assert page.run("$('max_tokens').value") == "30"
        page.run("$('question').focus()")
        page.type("Who is there?")
        page.press("Enter")
        page.wait("!running && turns.length === 2")
    come(page, running)


def test_a_key_is_asked_for(page: Page, running: Running) -> None:
    with serving(rows=1, api_key="secret") as closed:
        page.call("Page.navigate", url=closed.url)
        page.wait("typeof $ === 'function' && $('settings').open && $('status').textContent.includes('API key')")
        page.run("$('key').focus()")
        page.type("secret")
        page.press("Enter")
        page.wait("$('model').textContent === 'mistral-bundled' && $('status').textContent === ''")
    come(page, running)  # for the tests that may come after this one
