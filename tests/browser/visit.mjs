// node visit.mjs FOLDER MODULES CHROMIUM: serves FOLDER (and MODULES' onnxruntime-web), opens index.html, prints its answers.
import { createReadStream, mkdtempSync, rmSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { extname, join, normalize } from "node:path";

const [folder, modules, executablePath] = process.argv.slice(2);
const { chromium } = createRequire(join(modules, "package.json"))("playwright-core");
const types = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm" };
const runtime = "/onnxruntime-web/";

const server = createServer((request, response) => {
  const path = normalize(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
  const file = path.startsWith(runtime)
    ? join(modules, "node_modules/onnxruntime-web/dist", path.slice(runtime.length))
    : join(folder, path);
  if (!statSync(file, { throwIfNoEntry: false })?.isFile()) {
    return response.writeHead(404).end();
  }
  response.writeHead(200, {
    "Content-Type": types[extname(file)] ?? "application/octet-stream",
    "Cross-Origin-Opener-Policy": "same-origin",  // without these two a page has no threads
    "Cross-Origin-Embedder-Policy": "require-corp",
  });
  createReadStream(file).pipe(response);
});
await new Promise(ready => server.listen(0, "127.0.0.1", ready));

const profile = mkdtempSync(join(tmpdir(), "chromium-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath,
  headless: true,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
try {
  const page = await context.newPage();
  await page.goto(`http://127.0.0.1:${server.address().port}/index.html`);
  await page.waitForFunction(() => window.answers || window.failure, null, { timeout: 120_000 });
  const found = await page.evaluate(() => ({
    answers: window.answers, failure: window.failure, isolated: crossOriginIsolated, said: document.body.innerText,
  }));
  process.stdout.write(JSON.stringify(found));
} finally {
  await context.close();
  server.close();
  rmSync(profile, { recursive: true, force: true });
}
