"use strict";
/* Scores of the behavior of an attention head on a text: the average weight that it gives to certain positions.

weights: [T, T], a row for each query and a column for each key; ids: the T tokens. The scores are averages over queries:
    current token, previous token, 2 to 8 back    the weight at that distance
    first token                                   the weight of position 0
    induction (Olsson et al. 2022)                the total weight of the tokens that followed earlier occurrences of the
                                                  query's token; over the queries that have such tokens
The first queries are excluded, because they have few keys to choose from. */

const LONGEST_DISTANCE = 8;
const FIRST_QUERY = 4;
const CLEAR = 0.4; // below this score, the behavior is called mixed

function headScores(weights, ids) {
  const T = ids.length;
  const mean = (score, from) => {
    const values = ids.map((_, t) => (t >= from ? score(t) : null)).filter((value) => value !== null);
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : 0;
  };
  const names = ["current token", "previous token"];
  const scores = Array.from({ length: LONGEST_DISTANCE + 1 }, (_, distance) => ({
    name: names[distance] ?? `${distance} back`,
    score: mean((t) => weights[t * T + t - distance], Math.max(distance, FIRST_QUERY)),
  }));
  scores.push({ name: "first token", score: mean((t) => weights[t * T], LONGEST_DISTANCE + 1) });
  const induction = (t) => {
    const followers = ids.slice(0, t - 1).flatMap((id, s) => (id === ids[t] ? [s + 1] : []));
    return followers.length ? followers.reduce((sum, s) => sum + weights[t * T + s], 0) : null;
  };
  scores.push({ name: "induction", score: mean(induction, FIRST_QUERY) });
  return scores.sort((a, b) => b.score - a.score);
}

const headLabel = ([best]) => (best.score >= CLEAR ? best.name : "mixed");

if (typeof module !== "undefined") module.exports = { headScores, headLabel };
