// Sets the theme before the first paint: the one chosen earlier, else the system's. Not a module, so that it blocks.
document.documentElement.dataset.theme =
  localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
  if (!localStorage.getItem("theme")) {
    document.documentElement.dataset.theme = event.matches ? "dark" : "light";
  }
});
