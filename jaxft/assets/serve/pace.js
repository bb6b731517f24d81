// When the page is drawn for what comes from the server.

const REDRAW_MS = 250;
let draw = () => {};

// Calls a function soon after it is asked for: at most four times a second, and not while nobody sees the page.
export function paced(function_) {
  let timer = null, late = false, before = -Infinity;
  const run = () => {
    timer = null;
    late = document.hidden;
    if (late) return;
    before = performance.now();
    function_();
  };
  document.addEventListener("visibilitychange", () => void (late && !document.hidden && run()));
  return () => {
    if (timer === null && !late) timer = setTimeout(run, Math.max(0, before + REDRAW_MS - performance.now()));
  };
}

export const changed = () => draw();
export const changesDraw = (function_) => (draw = paced(function_));
