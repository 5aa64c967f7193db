(width, height, xShift, yShift, zoom) => {
  // The same as camera_outline.py; called whenever a slider moves.
  const outline = document.getElementById("outline");
  if (!outline) return;
  const words = outline.querySelector(".words");
  const numbers = [width, height, xShift, yShift, zoom];
  const possible = numbers.every((n) => typeof n === "number" && isFinite(n)) && width > 0 && height > 0 && zoom > 0;
  outline.classList.toggle("impossible", !possible);
  if (!possible) {
    outline.dataset.view = "";
    words.textContent = "no such view: sides and zoom must be above 0";
    return;
  }
  const halfX = Math.sqrt(width / height) / 2, halfY = Math.sqrt(height / width) / 2;
  const x = xShift / halfX, y = yShift / halfY;
  const [left, top, right, bottom] = [(x - 1) / zoom, (y - 1) / zoom, (x + 1) / zoom, (y + 1) / zoom];
  outline.dataset.view = [left, top, right, bottom].join(" ");

  // In a unit that is the same for both directions, with room for both rectangles.
  const unitX = 2 * halfX, unitY = 2 * halfY;
  const place = (rectangle, l, t, r, b) => {
    const box = { x: l * unitX, y: t * unitY, width: (r - l) * unitX, height: (b - t) * unitY };
    for (const [name, value] of Object.entries(box)) rectangle.setAttribute(name, value);
  };
  place(outline.querySelector("rect.frame"), -1, -1, 1, 1);
  place(outline.querySelector("rect.view"), left, top, right, bottom);
  const reach = [left, right, 1].map((e) => Math.abs(e) * unitX).concat([top, bottom, 1].map((e) => Math.abs(e) * unitY));
  const box = 1.25 * Math.max(...reach);
  outline.querySelector("svg").setAttribute("viewBox", [-box, -box, 2 * box, 2 * box].join(" "));

  const overlap = (from, to) => Math.max(0, Math.min(1, to) - Math.max(-1, from)) / 2;
  const seen = Math.round(100 * overlap(left, right) * overlap(top, bottom));
  const beyond = left < -1 || top < -1 || right > 1 || bottom > 1 ? ", and what lies beyond it" : "";
  words.textContent = (seen === 100 ? "all" : `${seen}%`) + " of the frame" + beyond;
}
