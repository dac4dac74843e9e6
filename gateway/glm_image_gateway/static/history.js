// The requests of this browser and their images, in IndexedDB; the oldest are deleted beyond a number and a size.

const MAX_RUNS = 60;
const MAX_BYTES = 256 * 1024 * 1024;
const STORE = "runs";

let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("glm-image", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function transaction(mode, act) {
  const base = await database();
  return new Promise((resolve, reject) => {
    const change = base.transaction(STORE, mode);
    const request = act(change.objectStore(STORE));
    change.oncomplete = () => resolve(request.result);
    change.onabort = change.onerror = () => reject(change.error ?? request.error);
  });
}

/** Returns all runs, the newest first: `{id, created, options, sources, images: [{file, seed, width, height}], seconds}`. */
export async function allRuns() {
  return (await transaction("readonly", (store) => store.getAll())).reverse();
}

/**
 * Adds a run and returns it with its id.
 *
 * @throws {DOMException} the browser has no room, even after the oldest runs were deleted.
 */
export async function addRun(run) {
  const runs = await allRuns();
  await deleteRuns(beyondLimits([run, ...runs], MAX_RUNS, MAX_BYTES));
  for (;;) {
    try {
      return { ...run, id: await transaction("readwrite", (store) => store.add(run)) };
    } catch (error) {
      const oldest = (await allRuns()).at(-1);
      if (error.name !== "QuotaExceededError" || !oldest) throw error;
      await deleteRuns([oldest]);
    }
  }
}

/** Deletes runs. */
export async function deleteRuns(runs) {
  for (const run of runs) await transaction("readwrite", (store) => store.delete(run.id));
}

/** Deletes all runs. */
export async function clearRuns() {
  await transaction("readwrite", (store) => store.clear());
}

/** Returns the runs, the newest first, that exceed a number or a sum of bytes; the newest never does. */
export function beyondLimits(runs, maxRuns, maxBytes) {
  let bytes = 0;
  return runs.filter((run, index) => {
    bytes += [...run.images.map((image) => image.file), ...run.sources].reduce((sum, file) => sum + file.size, 0);
    return index > 0 && (index >= maxRuns || bytes > maxBytes);
  });
}
