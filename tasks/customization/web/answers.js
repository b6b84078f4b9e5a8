element.addEventListener('click', event => {
  const button = event.target.closest('[data-label]');
  if (button) trigger('pick', {label: button.dataset.label});
});
