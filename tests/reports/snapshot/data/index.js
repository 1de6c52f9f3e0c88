window.HARNESS = { index: [{"key":"smollm2-135m-a0e6f666","title":"smollm2-135m"}] };
