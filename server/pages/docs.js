// Swagger UI on this server's own description of itself.
import { askForKey, withKey } from "./key.js";

async function show() {
  const problem = document.getElementById("problem");
  problem.hidden = true;
  const response = await fetch("openapi.json", { headers: withKey() });
  if (response.status === 401) {
    askForKey(document.getElementById("key-form"), show);
    return;
  }
  if (!response.ok) {
    problem.textContent = `GET /openapi.json gave ${response.status}`;
    problem.hidden = false;
    return;
  }
  window.SwaggerUIBundle({
    spec: await response.json(),
    dom_id: "#swagger",
    deepLinking: true,
    validatorUrl: null,
    requestInterceptor: (request) => ({ ...request, headers: withKey(request.headers) }),
  });
}

show();
