// What is wrong with a page as it is laid out: text that leaves its box or the window, labels of a chart over one
// another, boxes with nothing in them, text too faint to be read (WCAG 2: 4.5 to 1). On paper nothing can be scrolled.
(() => {
  const faults = []
  const width = document.documentElement.clientWidth
  const paper = matchMedia("print").matches
  const visible = (e) => e.checkVisibility({ contentVisibilityAuto: true })
  const scrolls = (e) =>
    !paper && e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement))

  // Colours as the browser mixes them: painted one over another on a canvas of one pixel.
  const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true })
  const paint = (colour) => {
    pixel.fillStyle = colour
    pixel.fillRect(0, 0, 1, 1)
  }
  const luminance = () => {
    const [red, green, blue] = [...pixel.getImageData(0, 0, 1, 1).data]
      .map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
  }
  const paintGround = (e) => {
    if (!e) return paint("white")
    paintGround(e.parentElement)
    paint(getComputedStyle(e).backgroundColor)
  }
  const contrast = (e, colour) => {
    paintGround(e)
    const ground = luminance()
    paint(colour)
    const text = luminance()
    return (Math.max(ground, text) + 0.05) / (Math.min(ground, text) + 0.05)
  }

  if (document.documentElement.scrollWidth > width) faults.push("the page scrolls sideways")

  const texts = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT)
  const range = new Range()
  while (texts.nextNode()) {
    const node = texts.currentNode
    const e = node.parentElement
    if (!node.data.trim() || e.closest("title, style, script") || !visible(e)) continue
    range.selectNodeContents(node)
    const out = [...range.getClientRects()].some((box) => box.right > width + 1 || box.left < -1)
    if (out && !scrolls(e)) faults.push(`outside: ${node.data.slice(0, 60)}`)
    const style = getComputedStyle(e)
    if (contrast(e, e.closest("svg") ? style.fill : style.color) < 4.5) faults.push(`faint: ${node.data.slice(0, 60)}`)
  }

  for (const box of document.querySelectorAll(".card, .panel, .card *, td, dd")) {
    const apart = box.closest("svg") || getComputedStyle(box).display === "inline" || scrolls(box)
    if (!apart && box.scrollWidth > box.clientWidth + 1) faults.push(`too wide: ${box.innerText.slice(0, 60)}`)
  }

  for (const chart of document.querySelectorAll("svg[role=img]")) {
    if (!chart.checkVisibility()) continue
    const frame = chart.getBoundingClientRect()
    const labels = [...chart.querySelectorAll("text")].map((e) => [e.textContent, e.getBoundingClientRect()])
    labels.forEach(([said, one], place) => {
      const inside = one.left >= frame.left - 1 && one.right <= frame.right + 1 && one.bottom <= frame.bottom + 1
      if (!inside) faults.push(`out of its chart: ${said}`)
      for (const [other, two] of labels.slice(place + 1)) {
        const across = Math.min(one.right, two.right) - Math.max(one.left, two.left)
        const down = Math.min(one.bottom, two.bottom) - Math.max(one.top, two.top)
        if (across > 1 && down > 2) faults.push(`over one another: ${said}, ${other}`)
      }
    })
  }

  for (const box of document.querySelectorAll("section, .card, .panel, tbody, dl, details"))
    if (!box.textContent.trim() && !box.querySelector("svg > *")) faults.push(`empty: ${box.className}`)
  return faults
})()
