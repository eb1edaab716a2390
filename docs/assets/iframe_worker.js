// Browsers start no workers for pages that are opened from disk. There, search's worker runs in a hidden frame instead.
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super();
      const frame = Object.assign(document.createElement("iframe"), { hidden: true });
      document.body.append(frame);
      this.inner = frame.contentWindow;
      frame.contentDocument.open(); // or Firefox would replace the document later
      frame.contentDocument.write("<!doctype html><body></body>");
      frame.contentDocument.close();
      // What the script posts is a message of this worker.
      this.inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = Object.assign(frame.contentDocument.createElement("script"), { src: url });
      this.ready = new Promise((resolve) => script.addEventListener("load", resolve));
      frame.contentDocument.body.append(script);
    }
    async postMessage(data) {
      await this.ready;
      this.inner.dispatchEvent(new MessageEvent("message", { data }));
    }
    terminate() {
      this.inner.frameElement.remove();
    }
  }
  window.Worker = window.IFrameWorker = IFrameWorker; // the latter name is what the script looks for
}
