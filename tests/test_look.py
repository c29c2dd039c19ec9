"""The page to look inside: its numbers are the model's, its errors are for people, and it works in a browser."""

import base64
import json
import math
import shutil

import pytest
import torch

import look
from conftest import ROOT
from load_weights import AutoModelForCausalLM, AutoTokenizer
from mistakes import variants

DEMOS = {name: str(ROOT / "checkpoints" / name) for name in ("demo-neo", "demo-neox")}
TEXT = "MACBETH. Is this a dagger which I see before me,\nThe handle toward my hand?"


def data_of(page):
    line = next(line for line in page.splitlines() if line.startswith("const data = "))
    return json.loads(line.removeprefix("const data = ").removesuffix(";"))


def unpacked(side, layer, T):
    """Attention weights (H, T, T) as the page has them."""
    numbers = torch.frombuffer(bytearray(base64.b64decode(side["attention"][layer])), dtype=torch.uint8)
    weights = torch.zeros(side["heads"], T, T)
    kept = torch.ones(T, T, dtype=torch.bool)
    weights[:, kept.tril() if side["causal"][layer] else kept] = (numbers.view(side["heads"], -1) / 255) ** 2
    return weights


@pytest.mark.parametrize("name", DEMOS)
def test_numbers_are_the_models(name):
    model = AutoModelForCausalLM.from_pretrained(DEMOS[name])
    tokenizer = AutoTokenizer.from_pretrained(DEMOS[name])
    data = data_of(look.look(TEXT, model, tokenizer=tokenizer))
    assert "".join(data["tokens"]) == TEXT and data["ids"] == tokenizer.encode(TEXT)
    [side] = data["sides"]
    ids = torch.tensor([data["ids"]])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_attentions=True)
        for layer, weights in enumerate(out.attentions):
            shown, right = unpacked(side, layer, len(data["ids"])), weights[0]
            assert ((shown - right).abs() <= right.sqrt() / 255 + 1e-5).all()
        lens = [model.lm_head(model.transformer.ln_f(x))[0] for x in out.hidden_states[:-1]] + [out.logits[0]]
    assert side["windows"] == model.config.windows and len(side["lens"]) == len(lens) == len(side["norms"])
    for rows, logits in zip(side["lens"], lens):
        top = logits.softmax(-1).topk(look.LIKELIEST)
        for shown, ps, best in zip(rows, top.values, top.indices):
            texts = [tokenizer.decode([i]) for i in best.tolist()]         # a part of a character is shown as bytes
            assert all(mine == right or "\ufffd" in right and mine[0] == "<" for (mine, _), right in zip(shown, texts))
            assert all(math.isclose(p, q, rel_tol=1e-3) for (_, p), q in zip(shown, ps.tolist()))
    for row, x in zip(side["norms"][:-1], out.hidden_states):
        assert torch.allclose(torch.tensor(row), x[0].norm(dim=-1), atol=1e-3)


def test_a_mistake_and_another_model_stand_beside():
    data = data_of(look.look(TEXT, mistake="no-causal-mask"))
    right, wrong = data["sides"]
    assert all(right["causal"]) and not any(wrong["causal"]) and wrong["name"] == "demo-neo, no-causal-mask"
    assert unpacked(wrong, 0, len(data["ids"])).triu(1).any()
    again = data_of(look.look(TEXT, other=DEMOS["demo-neo"]))["sides"]
    assert again[0] == again[1] == right                   # the mistake is gone, too


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS)
def test_every_mistake_can_be_looked_at(name):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMOS[name]), AutoTokenizer.from_pretrained(DEMOS[name])
    for id in {mistake.id for mistake, _ in variants(model)} - {"extra-first-token"}:
        right, wrong = data_of(look.look(TEXT * 3, model, tokenizer=tokenizer, mistake=id))["sides"]
        assert right["lens"] != wrong["lens"] or id == "weights-float16", id       # which is stored in float16
    with pytest.raises(ValueError, match="extra-first-token reads another number of tokens"):
        look.look(TEXT, model, tokenizer=tokenizer, mistake="extra-first-token")


@pytest.mark.parametrize("options, words", [
    (dict(text=""), "the text has 0 tokens"), (dict(text="a " * 600), "can show 1 to 512"),
    (dict(mistake="no-such"), "no mistake 'no-such'; similar are no-scale"),
    (dict(mistake="rotary-base"), "no mistake 'rotary-base' in gpt_neo"),
    (dict(mistake="scaled-scores", other=DEMOS["demo-neo"]), "give one"),
    (dict(other=DEMOS["demo-neox"]), "different tokens"), (dict(model="no/such/folder"), "no/such/folder")])
def test_what_cannot_be_shown_is_refused(options, words, tmp_path, capsys):
    arguments = [options.pop("text", TEXT), "--out", str(tmp_path / "page.html")]
    for name, value in options.items():
        arguments += [f"--{name}", value]
    assert look.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not list(tmp_path.iterdir())


def test_more_bad_calls(tmp_path, capsys):
    assert look.main([TEXT, "--out", str(tmp_path)]) == 2 and "is a folder: name a file" in capsys.readouterr().err
    assert look.main(["\udce9", "--out", str(tmp_path / "p.html")]) == 2 and "not UTF-8" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(DEMOS["demo-neo"])
    with pytest.raises(ValueError, match="needs its tokenizer"):
        look.look(TEXT, model)


def test_size_and_odd_text():
    """100 tokens are at most 1 MB; nothing in the text can end the script; no part of a character is lost."""
    text = "</script><b>é\u200b😀 " + TEXT * 4
    page = look.look(text)
    data = data_of(page)
    assert len(data["ids"]) >= 100 and len(page.encode()) < 1e6
    assert page.count("</script>") == 1 and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert any(token.startswith("<F0>") or "<F0>" in token for token in data["tokens"])
    assert "<iframe srcdoc=" in page._repr_html_() and "<b>é" not in page._repr_html_()


# ------------------------------------------------------------------------------------------------
# In a browser
# ------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")


def opened(browser, path, page):
    path.write_text(page, encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    return browser.find_elements("css selector", "#tokens button")


@needs_browser
def test_the_page_shows_what_a_token_reads(browser, tmp_path):
    """Pointing, clicking and arrow keys choose; what is said and shown is the model's."""
    from selenium.webdriver import ActionChains, Keys
    page = look.look(TEXT)
    data = data_of(page)
    [side] = data["sides"]
    tokens = opened(browser, tmp_path / "page.html", page)
    assert len(tokens) == len(data["tokens"])

    ActionChains(browser).move_to_element(tokens[5]).perform()
    assert tokens[5].get_attribute("aria-pressed") == "true"
    browser.find_element("css selector", "[data-layer='1'][data-head='2']").click()
    weights = unpacked(side, 1, len(tokens))[2]
    best = int(weights[5].argmax())
    said = browser.find_element("id", "said").text
    assert said.startswith(f"In layer 1, head 2, token 5 “{data['tokens'][5].strip() or '⏎'}")
    assert f"” {100 * weights[5, best]:.0f} %" in said
    for query, key in ((5, best), (9, 5), (5, 9), (0, 0)):
        shown = browser.execute_script(f"return weight(data.sides[0], 1, 2, {query}, {key})")
        assert math.isclose(shown, float(weights[query, key]), abs_tol=1e-6)
    first = browser.find_element("css selector", "#next0 .bar span").text
    assert first.strip("·⏎") == side["lens"][-1][5][0][0].strip()

    tokens[5].send_keys(Keys.ARROW_RIGHT)
    assert tokens[6].get_attribute("aria-pressed") == "true" and browser.switch_to.active_element == tokens[6]
    browser.find_element("css selector", ".heads [aria-pressed=true]").send_keys(Keys.ARROW_DOWN)
    assert "Layer 2, head 2: global" in browser.find_element("id", "which0").text
    browser.find_element("css selector", ".heads [aria-pressed=true]").send_keys(Keys.ARROW_DOWN)
    assert "local, the last 64 tokens" in browser.find_element("id", "which0").text
    assert browser.get_log("browser") == []


@needs_browser
def test_the_page_fits_a_phone_and_marks_differences(browser, tmp_path):
    opened(browser, tmp_path / "page.html", look.look(TEXT, mistake="scaled-scores"))
    assert browser.find_elements("css selector", "#lens1 td.changed") and not browser.find_elements("css selector", "#lens0 td.changed")
    browser.set_window_size(500, 900)                      # the least that headless Chromium takes
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.set_window_size(1200, 1000)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=360, height=740, deviceScaleFactor=2, mobile=True))
    assert browser.execute_script("return document.documentElement.scrollWidth <= 360")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[dict(name="prefers-color-scheme", value="dark")]))
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != before
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[]))


@needs_browser
@pytest.mark.slow
def test_a_large_page_opens(browser, tmp_path):
    """300 tokens through gpt-neo-125m's shape: at most 10 MB."""
    from neo import GPTNeoConfig, GPTNeoForCausalLM
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(GPTNeoConfig(hidden_size=768, num_layers=12, num_heads=12,
                                           attention_types=[[["global", "local"], 6]])).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMOS["demo-neo"])
    text = tokenizer.decode(tokenizer.encode((ROOT / "LICENSE").read_text())[:300])
    page = look.look(text, model, tokenizer=tokenizer)
    assert len(page.encode()) < 10e6
    assert len(opened(browser, tmp_path / "page.html", page)) >= 298
