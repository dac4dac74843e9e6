// The texts of the page in each language. The server's own sentences are shown as they are.

const TEXTS = {
  en: {
    skipToPrompt: "Skip to the prompt",
    prompt: "Prompt",
    promptExample: "A red fox reading a newspaper that says “NEWS”",
    promptHint: "Text in quotation marks becomes lettering in the image.",
    sourceImages: "Source images",
    dropHint: "Drop, paste or choose up to 4 images to edit",
    removeSource: "Remove source image {0}",
    sourceAlt: "Source image {0}",
    size: "Size",
    sizeAsSource: "As source",
    width: "Width",
    height: "Height",
    swap: "Swap width and height",
    steps: "Steps",
    guidance: "Guidance",
    seed: "Seed",
    random: "random",
    randomSeed: "Random seed",
    count: "Images",
    format: "Format",
    generate: "Generate",
    cancel: "Cancel",
    result: "Result",
    close: "Close",
    progress: "Progress",
    empty: "Describe an image, or start with an example:",
    example1: "A red fox with a sign that says 'NEWS'",
    example2: "A yellow ring left of a blue square on a light green background",
    example3: "一个红色圆形，浅蓝色背景",
    history: "History",
    historyHint: "Kept in this browser only.",
    clear: "Clear",
    clearQuestion: "Delete all images of the history in this browser?",
    delete: "Delete",
    showAgain: "Show: {0}",
    deleteEntry: "Delete from the history: {0}",
    again: "Again with this seed",
    againDone: "The prompt and all options of the image are in the form.",
    download: "Download",
    edit: "Use as source",
    enlarge: "Enlarge",
    apiKey: "API key",
    keyHint: "This server needs an API key. It is kept until this tab is closed.",
    save: "Save",
    toggleTheme: "Light or dark",
    ready: "Ready",
    connecting: "Connecting …",
    notReady: "The server is not ready; trying again …",
    unreachable: "The gateway does not answer; trying again …",
    needsKey: "An API key is needed",
    waitingForServer: "Waiting for the server; the request is then sent again",
    sent: "Sent",
    gateway_queue: "Waiting for its turn",
    ar_queue: "Waiting in the queue",
    prefill: "Reading the prompt",
    decode: "Composing: {0} of {1} tokens",
    dit_queue: "Waiting to be rendered",
    condition: "Preparing to render",
    denoise: "Rendering: step {0} of {1}",
    vae: "Decoding pixels",
    encode: "Encoding the file",
    announceDecode: "Composing",
    announceDenoise: "Rendering",
    announcePreview: "A preview is shown.",
    announceDone: "Done: {0} images in {1}.",
    cancelled: "Cancelled.",
    eta: "about {0} left",
    elapsed: "{0} so far",
    previewAlt: "Preview of: {0}",
    sourceInvalid: "“{0}” is no PNG, JPEG or WebP file.",
    sourcesTooMany: "There can be at most {0} source images.",
    streamBroken: "The connection ended before the image was complete.",
    historyFull: "The browser refused to store the image in the history: {0}",
    seconds: "{0} s",
    minutes: "{0} min {1} s",
    facts: "{0} × {1} · {2} steps · guidance {3} · seed {4}",
  },
  zh: {
    skipToPrompt: "跳到提示词",
    prompt: "提示词",
    promptExample: "一只红狐狸举着写有“新闻”的牌子",
    promptHint: "引号中的文字会显示在图像里。",
    sourceImages: "源图像",
    dropHint: "拖入、粘贴或选择最多 4 张要编辑的图像",
    removeSource: "移除源图像 {0}",
    sourceAlt: "源图像 {0}",
    size: "尺寸",
    sizeAsSource: "同源图像",
    width: "宽",
    height: "高",
    swap: "交换宽和高",
    steps: "步数",
    guidance: "引导强度",
    seed: "种子",
    random: "随机",
    randomSeed: "随机种子",
    count: "张数",
    format: "格式",
    generate: "生成",
    cancel: "取消",
    result: "结果",
    close: "关闭",
    progress: "进度",
    empty: "描述一幅图像，或从示例开始：",
    example1: "一个红色圆形，浅蓝色背景",
    example2: "A red fox with a sign that says 'NEWS'",
    example3: "A yellow ring left of a blue square on a light green background",
    history: "历史记录",
    historyHint: "仅保存在此浏览器中。",
    clear: "清空",
    clearQuestion: "删除此浏览器历史记录中的所有图像？",
    delete: "删除",
    showAgain: "显示：{0}",
    deleteEntry: "从历史记录中删除：{0}",
    again: "用此种子重来",
    againDone: "该图像的提示词和所有选项已填入表单。",
    download: "下载",
    edit: "用作源图像",
    enlarge: "放大",
    apiKey: "API 密钥",
    keyHint: "此服务器需要 API 密钥。密钥保留到此标签页关闭为止。",
    save: "保存",
    toggleTheme: "浅色或深色",
    ready: "就绪",
    connecting: "正在连接……",
    notReady: "服务器尚未就绪，正在重试……",
    unreachable: "网关没有应答，正在重试……",
    needsKey: "需要 API 密钥",
    waitingForServer: "正在等待服务器，就绪后将重新发送请求",
    sent: "已发送",
    gateway_queue: "等待轮到此请求",
    ar_queue: "排队中",
    prefill: "读取提示词",
    decode: "构图：第 {0} / {1} 个标记",
    dit_queue: "等待渲染",
    condition: "准备渲染",
    denoise: "渲染：第 {0} / {1} 步",
    vae: "解码像素",
    encode: "编码文件",
    announceDecode: "构图中",
    announceDenoise: "渲染中",
    announcePreview: "已显示预览。",
    announceDone: "完成：{0} 张图像，用时 {1}。",
    cancelled: "已取消。",
    eta: "约剩 {0}",
    elapsed: "已用 {0}",
    previewAlt: "预览：{0}",
    sourceInvalid: "“{0}”不是 PNG、JPEG 或 WebP 文件。",
    sourcesTooMany: "最多可以有 {0} 张源图像。",
    streamBroken: "图像完成之前连接已断开。",
    historyFull: "浏览器拒绝将图像存入历史记录：{0}",
    seconds: "{0} 秒",
    minutes: "{0} 分 {1} 秒",
    facts: "{0} × {1} · {2} 步 · 引导 {3} · 种子 {4}",
  },
};

const LANGUAGES = Object.keys(TEXTS);
const NAMES = { en: "English", zh: "中文" };
const listeners = [];
let language = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");

/** Returns a text in the chosen language; {0}, {1}, ... are replaced by the values. */
export function text(name, ...values) {
  return TEXTS[language][name].replace(/\{(\d)\}/g, (_, index) => values[index]);
}

/** Returns a duration in words. */
export function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return text("seconds", seconds < 9.95 && seconds % 1 ? seconds.toFixed(1) : whole);
  return text("minutes", Math.floor(whole / 60), whole % 60);
}

/** Writes the texts of all elements inside `root` that name one. */
export function translate(root = document) {
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = text(element.dataset.text);
  for (const [key, attribute] of [["label", "aria-label"], ["title", "title"], ["placeholder", "placeholder"]]) {
    for (const element of root.querySelectorAll(`[data-${key}]`)) {
      element.setAttribute(attribute, text(element.dataset[key]));
    }
  }
}

/** Calls `listener` now and after each change of the language. */
export function onLanguage(listener) {
  listeners.push(listener);
  listener();
}

/** Connects the button that changes the language, and translates the page. */
export function startLanguages(button) {
  const apply = () => {
    const other = LANGUAGES.find((name) => name !== language);
    document.documentElement.lang = language;
    button.textContent = NAMES[other];
    button.lang = other;
    translate();
    for (const listener of listeners) listener();
  };
  button.addEventListener("click", () => {
    language = LANGUAGES.find((name) => name !== language);
    localStorage.setItem("language", language);
    apply();
  });
  apply();
}
