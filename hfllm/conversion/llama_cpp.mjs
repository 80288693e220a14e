// Runs llama.cpp on a GGUF file, through the npm package node-llama-cpp.
//
// node llama_cpp.mjs JOB RESULT: two JSON files. The job holds
//   package        node-llama-cpp's folder
//   model          the GGUF file
//   threads        CPU threads
//   texts          texts to encode, with control tokens read as such and as plain text
//   conversations  the inputs of the chat template, one object for each conversation
//   runs           [{prompt, continuation}]: token ids; the continuation is fed one token at a time
//   top            how many of the largest logits to report at each step of a run
import {readFile, writeFile} from "node:fs/promises";
import path from "node:path";
import {pathToFileURL} from "node:url";

process.on("uncaughtException", (error) => {
    console.error(String(error)); // without the stack: llama.cpp's own messages explain the error
    // They come from another thread, and may still be waiting in the event loop: let it run before the end.
    setTimeout(() => process.exit(1), 200);
});

const [jobFile, resultFile] = process.argv.slice(2);
const job = JSON.parse(await readFile(jobFile, "utf8"));
const {getLlama} = await import(pathToFileURL(path.join(job.package, "dist", "index.js")).href);

const llama = await getLlama({
    gpu: false,
    build: "never", // only what is installed: nothing is compiled or downloaded
    skipDownload: true,
    progressLogs: false,
    maxThreads: job.threads,
    logLevel: "warn",
    logger: (level, message) => console.error(`llama.cpp ${level}: ${message.trimEnd()}`)
});
const model = await llama.loadModel({modelPath: job.model});
const tokenizer = model.fileInfo.metadata.tokenizer;
const result = {
    release: llama.llamaCppRelease.release,
    addsBos: model.tokens.shouldPrependBosToken,
    addsEos: model.tokens.shouldAppendEosToken,
    bos: model.tokens.bos,
    eos: model.tokens.eos,
    eot: model.tokens.eot,
    encoded: job.texts.map((text) => model.tokenize(text, true)),
    encodedAsPlainText: job.texts.map((text) => model.tokenize(text, false)),
    chats: null,
    runs: []
};

// llama.cpp's own Jinja; node-llama-cpp's public classes prefer one written in JavaScript.
const Jinja = llama._bindings?.AddonJinjaRenderer;
if (Jinja != null && tokenizer.chat_template != null) {
    const template = new Jinja(tokenizer.chat_template);
    result.chats = job.conversations.map((conversation) => {
        const text = template.render(conversation);
        return {text, ids: model.tokenize(text, true)};
    });
}

if (job.runs.length > 0) {
    const context = await model.createContext({
        contextSize: Math.max(...job.runs.map(({prompt, continuation}) => prompt.length + continuation.length)),
        threads: job.threads,
        // The default cache is float16, which would make the comparison less exact.
        experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32",
        flashAttention: false
    });
    const sequence = context.getSequence();
    const options = {generateNext: {token: true, logits: {filter: {tokens: [], includeTop: job.top}}, options: {temperature: 0}}};
    for (const {prompt, continuation} of job.runs) {
        await sequence.clearHistory();
        const steps = [];
        let tokens = [...prompt.slice(0, -1), [prompt.at(-1), options]];
        for (const next of continuation) {
            const output = (await sequence.controlledEvaluate(tokens)).at(-1).next;
            steps.push({token: output.token, top: [...output.logits]});
            tokens = [[next, options]];
        }
        result.runs.push(steps);
    }
    await context.dispose();
}
await model.dispose();
await llama.dispose();
await writeFile(resultFile, JSON.stringify(result));
