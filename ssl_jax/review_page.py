"""The page on which a person judges replies: one HTML file that needs no network and can be read without JavaScript.

What is on the page was written by strangers and by a model. It is escaped, and a policy in the page keeps it from
loading anything. The page's script gives back the rows of `review.jsonl` as they came, but for the last message's
content and the verdict.
"""

from __future__ import annotations

import html
import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem; color: #222;
  background: #fff; }
header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc; padding: .5rem 0; z-index: 1; }
h1 { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere; }
article { margin: 1.5rem 0; padding: 0 1rem 1rem; border: 1px solid #ccc; border-radius: .5rem; }
article.accept { border-color: #287a3c; box-shadow: 0 0 0 2px #287a3c; }
article.reject { border-color: #b3261e; box-shadow: 0 0 0 2px #b3261e; }
h2 { font-size: .85rem; font-weight: normal; color: #555; overflow-wrap: anywhere; }
.turn { max-width: 80%; width: fit-content; margin: .4rem 0; padding: .4rem .8rem; border-radius: 1rem;
  background: #eee; white-space: pre-wrap; overflow-wrap: anywhere; }
.assistant { margin-inline-start: auto; background: #dcebff; }
.system { margin-inline: auto; background: none; color: #555; font-size: .9rem; }
textarea { width: 100%; box-sizing: border-box; min-height: 4.5rem; font: inherit; padding: .4rem .8rem;
  border: 1px solid #6a93c8; border-radius: .5rem; background: #f4f9ff; }
button { font: inherit; padding: .3rem 1rem; border: 1px solid #777; border-radius: .5rem; background: #fff;
  cursor: pointer; }
.accept button[value=accept] { background: #287a3c; color: #fff; }
.reject button[value=reject] { background: #b3261e; color: #fff; }
"""

_SCRIPT = """
"use strict";
const rows = JSON.parse(document.getElementById("rows").textContent);
const articles = [...document.querySelectorAll("article")];
const verdicts = rows.map(row => row.verdict);
let saved = true;
function show() {
  articles.forEach((article, n) => {
    article.className = verdicts[n] || "";
    for (const button of article.querySelectorAll("button"))
      button.setAttribute("aria-pressed", button.value === verdicts[n]);
  });
  const count = verdict => verdicts.filter(given => given === verdict).length;
  document.getElementById("counts").textContent =
    `${count("accept")} accepted, ${count("reject")} rejected, ${count(null)} to do`;
}
articles.forEach((article, n) => {
  for (const button of article.querySelectorAll("button"))
    button.addEventListener("click", () => {
      verdicts[n] = verdicts[n] === button.value ? null : button.value;
      saved = false;
      show();
    });
  article.querySelector("textarea").addEventListener("input", () => { saved = false; });
});
document.getElementById("save").addEventListener("click", () => {
  const lines = rows.map((row, n) => {
    const area = articles[n].querySelector("textarea");
    const messages = row.messages.map(message => ({...message}));
    if (area.value !== area.defaultValue) messages[messages.length - 1].content = area.value;
    return JSON.stringify({...row, messages, verdict: verdicts[n]}) + "\\n";
  });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, {type: "application/jsonl"}));
  link.download = "review.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  saved = true;
});
window.addEventListener("beforeunload", event => { if (!saved) event.preventDefault(); });
for (const hidden of document.querySelectorAll("[hidden]")) hidden.hidden = false;
show();
"""

_PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1 dir="auto">$title</h1>
<noscript><p>Without JavaScript this page can be read; write verdicts into review.jsonl.</p></noscript>
<p hidden><span id="counts" aria-live="polite"></span> <button type="button" id="save">Save review.jsonl</button></p>
</header>
<main>
$articles
</main>
<script type="application/json" id="rows">$rows</script>
<script>$script</script>
</body>
</html>
""")

_ARTICLE = string.Template("""<article>
<h2>$number. <bdi>$id</bdi> · mean log-probability $score</h2>
$turns
<textarea dir="auto" autocomplete="off" aria-label="reply $number">
$reply</textarea>
<p hidden><button type="button" value="accept">Accept</button> <button type="button" value="reject">Reject</button></p>
</article>""")


def render(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page for rows of `review.jsonl`, whose last message is the reply to judge."""
    articles = [_article(number, row) for number, row in enumerate(rows, 1)]
    return _PAGE.substitute(
        title=html.escape(title),
        style=_STYLE,
        script=_SCRIPT,
        articles="\n".join(articles),
        # In a script element nothing is escaped, so nothing may look like its end.
        rows=json.dumps(list(rows), ensure_ascii=False).replace("<", "\\u003c"),
    )


def _article(number: int, row: Mapping[str, Any]) -> str:
    *context, reply = row["messages"]
    return _ARTICLE.substitute(
        number=number,
        id=html.escape(row["id"]),
        score=f"{row['score']:.2f}",
        turns="\n".join(
            f'<div class="turn {html.escape(turn["role"])}" dir="auto">{html.escape(turn["content"])}</div>'
            for turn in context
        ),
        reply=html.escape(reply["content"]),
    )
