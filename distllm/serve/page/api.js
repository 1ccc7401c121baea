// Asking the server, with an API key where it wants one.

const KEY = "distllm-key";
const form = document.getElementById("key");
const value = document.getElementById("key-value");
const wrong = document.getElementById("key-error");
let given = null; // what those that need a key wait for

/** A response that is no 401; the person is asked for a key until it is not. */
export async function ask(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers, cache: "no-store" });
    if (response.status !== 401) return response;
    await anotherKey(key);
  }
}

/** What an answer that is no 200 says. */
export async function sentence(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers with ${response.status}`;
  }
}

/** Waits for a key other than this one, which is not valid. */
function anotherKey(key) {
  if (sessionStorage.getItem(KEY) !== key) return null; // given meanwhile
  if (given === null) {
    given = new Promise((resolve) => {
      wrong.textContent = key === null ? "" : "That key is not valid.";
      form.hidden = false;
      value.focus();
      form.onsubmit = (event) => {
        event.preventDefault();
        sessionStorage.setItem(KEY, value.value.trim());
        value.value = wrong.textContent = "";
        form.hidden = true;
        given = null;
        resolve();
      };
    });
  }
  return given;
}
