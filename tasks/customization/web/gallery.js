// A deleted sample takes its button with it: the focus goes to the one that moves up.
let place = null;

element.addEventListener('click', event => {
  const remove = event.target.closest('[data-sample]'), show = event.target.closest('[data-show]');
  if (remove) {
    place = ['.mz-delete', [...element.querySelectorAll('.mz-delete')].indexOf(remove)];
    trigger('remove', {sample: remove.dataset.sample});
  }
  if (show) {
    place = ['.mz-chip', [...element.querySelectorAll('.mz-chip')].indexOf(show)];
    trigger('show', {character: show.dataset.show});
  }
});

watch('value', () => {
  if (!place) return;
  const buttons = element.querySelectorAll(place[0]);
  buttons[Math.min(place[1], buttons.length - 1)]?.focus();
  place = null;
});
