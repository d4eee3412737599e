// LaTeX names and the characters they stand for. Only what is needed to read mathematics in chats.

const table = (text) => new Map(text.trim().split(/\s+/).map((pair) => [pair.slice(0, -[...pair].at(-1).length), [...pair].at(-1)]));

// Set as variables.
export const LETTERS = table(`
  alphaα betaβ gammaγ deltaδ epsilonϵ varepsilonε zetaζ etaη thetaθ varthetaϑ iotaι kappaκ lambdaλ muμ nuν xiξ piπ
  varpiϖ rhoρ varrhoϱ sigmaσ varsigmaς tauτ upsilonυ phiϕ varphiφ chiχ psiψ omegaω GammaΓ DeltaΔ ThetaΘ LambdaΛ XiΞ PiΠ
  SigmaΣ UpsilonΥ PhiΦ PsiΨ OmegaΩ ellℓ hbarℏ imathı jmathȷ Reℜ Imℑ alephℵ infty∞ partial∂ nabla∇ emptyset∅ varnothing∅
  forall∀ exists∃ nexists∄ top⊤ bot⊥ angle∠ triangle△ square□ checkmark✓ prime′ degree°
`);

// Set as operators and relations.
export const OPERATORS = table(`
  times× cdot⋅ div÷ pm± mp∓ ast∗ star⋆ circ∘ bullet∙ oplus⊕ ominus⊖ otimes⊗ odot⊙ dagger† cap∩ cup∪ setminus∖ wedge∧ land∧
  vee∨ lor∨ neg¬ lnot¬ leq≤ le≤ geq≥ ge≥ leqslant⩽ geqslant⩾ neq≠ ne≠ equiv≡ approx≈ sim∼ simeq≃ cong≅ propto∝ ll≪ gg≫ prec≺
  succ≻ subset⊂ supset⊃ subseteq⊆ supseteq⊇ subsetneq⊊ in∈ notin∉ ni∋ mid∣ nmid∤ parallel∥ perp⊥ vdash⊢ models⊨ to→
  rightarrow→ leftarrow← gets← leftrightarrow↔ Rightarrow⇒ Leftarrow⇐ Leftrightarrow⇔ implies⟹ impliedby⟸ iff⟺
  longrightarrow⟶ Longrightarrow⟹ mapsto↦ uparrow↑ downarrow↓ hookrightarrow↪ rightleftharpoons⇌ ldots… dots… dotsc…
  cdots⋯ dotsb⋯ vdots⋮ ddots⋱ colon: therefore∴ because∵ triangleq≜ lt< gt> And&
`);

// Their limits stand above and below in a displayed formula.
export const BIG_OPERATORS = table("sum∑ prod∏ coprod∐ bigcup⋃ bigcap⋂ bigoplus⨁ bigotimes⨂ bigvee⋁ bigwedge⋀");
export const INTEGRALS = table("int∫ iint∬ iiint∭ oint∮");

export const FENCES = table("langle⟨ rangle⟩ lfloor⌊ rfloor⌋ lceil⌈ rceil⌉ lvert| rvert| vert| Vert‖ lVert‖ rVert‖ lbrace{ rbrace} lbrack[ rbrack]");
export const ACCENTS = table("hat^ widehat^ bar¯ overline¯ tilde~ widetilde~ vec→ overrightarrow→ dot˙ ddot¨ checǩ overbrace⏞");
export const UNDER_ACCENTS = table("underline_ underbrace⏟");

export const FUNCTIONS = new Set(
  "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp deg dim ker arg hom gcd lcm det Pr".split(" "),
);
export const LIMIT_FUNCTIONS = new Set("lim max min sup inf limsup liminf argmax argmin".split(" "));

// In em.
export const SPACES = new Map([[",", 0.17], [":", 0.22], [">", 0.22], [";", 0.28], ["!", -0.17], [" ", 0.25], ["quad", 1], ["qquad", 2], ["enspace", 0.5], ["thinspace", 0.17]]);

export const ENVIRONMENTS = new Map([
  ["matrix", ["", ""]], ["pmatrix", ["(", ")"]], ["bmatrix", ["[", "]"]], ["Bmatrix", ["{", "}"]], ["vmatrix", ["|", "|"]],
  ["Vmatrix", ["‖", "‖"]], ["cases", ["{", ""]], ["aligned", ["", ""]], ["align", ["", ""]], ["align*", ["", ""]],
  ["alignedat", ["", ""]], ["gathered", ["", ""]], ["gather", ["", ""]], ["gather*", ["", ""]], ["equation", ["", ""]],
  ["equation*", ["", ""]], ["split", ["", ""]], ["array", ["", ""]], ["smallmatrix", ["", ""]],
]);

// Letters of another style are characters of their own in Unicode; some were there before the others and lie elsewhere.
const STYLES = {
  bold: { upper: 0x1d400, lower: 0x1d41a, digit: 0x1d7ce },
  double: { upper: 0x1d538, lower: 0x1d552, digit: 0x1d7d8, C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ" },
  script: { upper: 0x1d49c, lower: 0x1d4b6, B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ", e: "ℯ", g: "ℊ", o: "ℴ" },
  fraktur: { upper: 0x1d504, lower: 0x1d51e, C: "ℭ", H: "ℌ", I: "ℑ", R: "ℜ", Z: "ℨ" },
};
export const STYLE_COMMANDS = new Map([
  ["mathbf", "bold"], ["boldsymbol", "bold"], ["bm", "bold"], ["mathbb", "double"], ["mathcal", "script"], ["mathscr", "script"],
  ["mathfrak", "fraktur"], ["mathrm", "upright"], ["mathsf", "upright"], ["mathtt", "upright"], ["mathit", "italic"],
]);

export function styled(character, style) {
  const set = STYLES[style];
  if (!set) return character;
  if (set[character]) return set[character];
  const code = character.charCodeAt(0);
  if (/^[A-Z]$/.test(character)) return String.fromCodePoint(set.upper + code - 65);
  if (/^[a-z]$/.test(character)) return String.fromCodePoint(set.lower + code - 97);
  if (/^[0-9]$/.test(character) && set.digit) return String.fromCodePoint(set.digit + code - 48);
  return character;
}
