// Files travel inside the page's own requests: no copy of anybody's handwriting is left in a temporary folder.
const LIMIT = Number(props.limit);

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(',') + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function read(files) {
  const size = files.reduce((sum, file) => sum + file.size, 0);
  if (size > LIMIT) return {too_large: size};
  try {
    return await Promise.all(
      files.map(async file => ({name: file.webkitRelativePath || file.name, data: file.size ? await base64(file) : ''})));
  } catch {
    return null;
  }
}

element.addEventListener('change', async event => {
  const files = [...event.target.files];
  if (!files.length) return;
  props.value = await read(files);
  event.target.value = '';
  trigger('take');
});

watch('value', () => {
  const file = props.value;
  if (!file?.download) return;
  const bytes = Uint8Array.from(atob(file.data), character => character.charCodeAt(0));
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([bytes], {type: 'application/octet-stream'}));
  link.download = file.download;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});
