"use strict";
// Shows the responses of the rollout groups whose reward lies between two numbers, and hides groups without any.
(() => {
  const root = document.getElementById("groups"), [low, high] = root.querySelectorAll("input");
  const responses = [...root.querySelectorAll("[data-reward]")];
  const rewards = responses.map((one) => one.dataset.reward).filter(Boolean).map(Number);
  for (const [input, value] of [[low, Math.min(...rewards)], [high, Math.max(...rewards)]])
    input.placeholder = rewards.length ? String(+value.toFixed(3)) : "";
  function filter() {
    const from = low.value === "" ? -Infinity : Number(low.value), to = high.value === "" ? Infinity : Number(high.value);
    const all = low.value === "" && high.value === "";
    for (const one of responses) {
      const reward = one.dataset.reward === "" ? NaN : Number(one.dataset.reward); // without a reward: shown unless filtered
      one.hidden = !all && !(reward >= from && reward <= to);
    }
    for (const group of root.querySelectorAll(".group")) group.hidden = !group.querySelector("[data-reward]:not([hidden])");
    root.querySelector("[role=status]").textContent = `${responses.filter((one) => !one.hidden).length} of ${responses.length} responses`;
  }
  for (const input of [low, high]) input.addEventListener("input", filter);
  root.querySelector(".controls").hidden = false;
  filter();
})();
