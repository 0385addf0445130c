// node page_in_browser.cjs URL FOLDER [KEY]: uses the pages as a person does, and prints as JSON what came of it.
const { chromium } = require("playwright-core");

const [url, folder, key] = process.argv.slice(2);
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];

async function main() {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: FLAGS });
  const context = await browser.newContext({ viewport: { width: 1200, height: 860 }, colorScheme: "light" });
  const page = await context.newPage();
  const seen = { problems: [], elsewhere: [], requests: [] };
  page.on("console", (message) => message.type() === "error" && seen.problems.push(message.text()));
  page.on("pageerror", (error) => seen.problems.push(String(error)));
  page.on("request", (request) => {
    seen.requests.push(new URL(request.url()).pathname);
    if (!request.url().startsWith(url) && !request.url().startsWith("data:")) seen.elsewhere.push(request.url());
  });

  await page.goto(url);
  if (key) {
    await page.waitForSelector("#key-form:not([hidden])");
    await page.screenshot({ path: `${folder}/key.png` });
    seen.problems = seen.problems.filter((text) => !text.includes("401")); // of the request that found out
    await page.fill("#key-form input", key);
    await page.click("#key-form button");
  }
  await page.waitForFunction(() => document.getElementById("state").textContent === "ready");
  await page.fill("#max-tokens", "48");
  for (const text of ["Name three birds of prey.", "Which of them is the fastest?"]) {
    const before = await page.locator(".figures").count();
    await page.fill("#prompt", text);
    await page.press("#prompt", "Enter");
    await page.waitForFunction((n) => document.querySelectorAll(".figures").length > n, before, { timeout: 60000 });
  }
  await page.locator(".figures button").last().click();
  await page.waitForFunction(() => [...document.querySelectorAll(".figures")].at(-1).textContent.includes("TTFT"));
  await page.waitForTimeout(1500); // another round of the gauges
  seen.messages = await page.locator("#messages li").evaluateAll((items) => items.map((item) => item.firstChild.data));
  seen.figures = await page.locator(".figures").allTextContents();
  seen.facts = await page.locator("#fact-list dd").allTextContents();
  seen.output = await page.textContent("#output-rate");
  seen.points = await page.getAttribute("#output-line polyline", "points");
  await page.screenshot({ path: `${folder}/page.png` });
  await page.emulateMedia({ colorScheme: "dark" });
  await page.screenshot({ path: `${folder}/page-dark.png` });
  await page.setViewportSize({ width: 420, height: 900 });
  await page.screenshot({ path: `${folder}/page-narrow.png`, fullPage: true });

  await page.setViewportSize({ width: 1200, height: 860 });
  await page.emulateMedia({ colorScheme: "light" });
  await page.goto(`${url}/docs`);
  await page.waitForSelector(".opblock", { timeout: 30000 });
  seen.operations = await page.locator(".opblock-summary-path").allTextContents();
  await page.screenshot({ path: `${folder}/docs.png` });
  await page.locator(".opblock", { hasText: "/v1/models" }).first().click();
  await page.locator(".try-out__btn").first().click();
  await page.locator(".execute").first().click();
  await page.waitForSelector(".live-responses-table .response .response-col_status");
  seen.tried = await page.locator(".live-responses-table .response .response-col_status").first().textContent();
  await browser.close();
  console.log(JSON.stringify(seen));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
