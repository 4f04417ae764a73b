// Asks the site's own search: its worker (a file of the theme) in a bare context, as a browser would start it.
//   node search.js SITE WORD…      prints a JSON list of pages a word
const fs = require("fs"), path = require("path"), vm = require("vm");
const [site, ...words] = process.argv.slice(2);
const scripts = path.join(site, "assets", "javascripts");
const index = JSON.parse(fs.readFileSync(path.join(site, "search", "search_index.json")));
const box = { console, setTimeout, URL, TextEncoder, performance, location: { href: "http://site/" } };
const waiting = [];
box.self = box.globalThis = box;
box.addEventListener = (_, handler) => { box.handler = handler; };
box.postMessage = (message) => waiting.shift()(message);
const load = (file) => vm.runInContext(fs.readFileSync(file, "utf8"), box);
box.importScripts = (...urls) =>
  urls.forEach((url) => load(path.join(scripts, "lunr", url.replace(/^.*\/lunr\//, ""))));
vm.createContext(box);
const workers = path.join(scripts, "workers");
load(path.join(workers, fs.readdirSync(workers).find((file) => /^search.*\.js$/.test(file))));
const ask = (data) => new Promise((done) => { waiting.push(done); box.handler({ data }); });
(async () => {
  await ask({ type: 0, data: { config: index.config, docs: index.docs, options: { suggest: false } } });
  for (const word of words) {
    const answer = await ask({ type: 2, data: word });
    console.log(JSON.stringify(answer.data.items.map((item) => item[0].location)));
  }
})();
