// A live region must stay in the page for its changes to be read out, so the template never changes.
const region = element.querySelector('[role=status]');
let timer;
watch('value', () => {
  clearTimeout(timer);
  region.innerHTML = props.value ?? '';
  // Good news goes away by itself; what went wrong stays until the next step.
  if (region.querySelector('.mz-done')) timer = setTimeout(() => region.replaceChildren(), 6000);
});
