"use strict";
// Texts of the dataset are untrusted: they are only ever assigned to textContent.
const data = JSON.parse(document.getElementById("tag-data").textContent);
const PAGE = 50;
let shown = PAGE;

function showView(number) {
  for (const part of document.querySelectorAll("[data-view]")) part.hidden = part.dataset.view !== number;
}
for (const choice of document.querySelectorAll("input[name=view]")) {
  choice.addEventListener("change", () => showView(choice.value));
}

const search = document.getElementById("tag-search"), category = document.getElementById("tag-category");
const rows = document.getElementById("tag-rows"), note = document.getElementById("tag-note");
const more = document.getElementById("tag-more");

function cell(kind, text, number) {
  const element = document.createElement(kind);
  element.textContent = text;
  if (number) element.className = "number";
  return element;
}

function names() {
  return category.value ? [category.value] : Object.keys(data.categories);
}

function format(count) {
  return count.toLocaleString("en");
}

function matches() {
  const wanted = search.value.trim().toLowerCase().replaceAll(" ", "_");
  const found = names().flatMap((name) => data.categories[name].tags
    .filter((tag) => tag[0].toLowerCase().replaceAll(" ", "_").includes(wanted)).map((tag) => [name, tag]));
  return found.sort((a, b) => b[1][1] - a[1][1]);
}

function showTags() {
  const found = matches();
  rows.replaceChildren(...found.slice(0, shown).map(([name, tag]) => {
    const row = document.createElement("tr"), title = cell("td", tag[0]), kind = cell("small", name);
    title.append(" ", kind);
    row.append(title, ...tag.slice(1).map((count) => cell("td", format(count), true)));
    return row;
  }));
  more.hidden = found.length <= shown;
  const tables = names().map((name) => data.categories[name]);
  const listed = tables.reduce((sum, table) => sum + table.tags.length, 0);
  const known = tables.reduce((sum, table) => sum + table.known, 0);
  const atLeast = tables.some((table) => table.forgotten) ? "at least " : "";
  const scope = listed < known ? `the ${format(listed)} most frequent of ${atLeast}${format(known)} tags` :
    `${format(known)} tags`;
  note.textContent = `${format(found.length)} matches among ${scope}, sorted by number of pictures.`;
}

for (const control of [search, category]) {
  control.addEventListener("input", () => { shown = PAGE; showTags(); });
}
more.addEventListener("click", () => { shown += 4 * PAGE; showTags(); });
document.getElementById("uncover").addEventListener("change", (event) => {
  document.body.classList.toggle("uncovered", event.target.checked);
});
showTags();
