// Browsers give a page that was opened from disk no workers, and the search is one: here it runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.scope = new Promise((ready) => {
        frame.onload = async () => {
          const scope = frame.contentWindow;
          const load = (src) => new Promise((resolve, reject) => {
            const script = scope.document.createElement("script");
            Object.assign(script, { src, onload: resolve, onerror: reject });
            scope.document.head.append(script);
          });
          scope.importScripts = (...urls) => urls.reduce((before, next) => before.then(() => load(next)), Promise.resolve());
          scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          await load(url);
          ready(scope);
        };
      });
      frame.srcdoc = "<html><head></head></html>";
      document.body.append(frame);
    }
    postMessage(data) {
      this.scope.then((scope) => scope.dispatchEvent(new scope.MessageEvent("message", { data })));
    }
  };
}
