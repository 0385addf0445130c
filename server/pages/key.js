// The key that the reader gave, for this tab alone, and requests that carry it.
const KEY = "peregrine-key";

export function savedKey() {
  return sessionStorage.getItem(KEY) || "";
}

export function saveKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export function withKey(headers = {}) {
  const key = savedKey();
  return key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
}

// Shows the form while the server wants a key, and calls `again` when one was given.
export function askForKey(form, again) {
  form.hidden = false;
  form.onsubmit = (event) => {
    event.preventDefault();
    saveKey(form.elements.key.value.trim());
    form.hidden = true;
    again();
  };
}
