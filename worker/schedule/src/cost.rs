//! What a step costs, learnt from steps: the longest prefill that still lets streams keep their pace.
//!
//! A step's time is taken to be a sum: something for being a step, something for each row, for each pair of a prompt's
//! token and one that it looks back at, and for each token of context that decode rows read. Steps with and without
//! prefill run different kernels and have weights of their own. The weights are those that explain the steps so far best,
//! none below zero: what was measured at the start counts for ever, but little; later steps count more and are forgotten.
//! Errors are relative, so that short steps count as much as long ones.

use crate::types::{Micros, Step};

/// Each new step counts, an old one this much less with every step of its kind.
const FORGET: f64 = 0.98;
/// What one step of the start counts, in steps.
const START_WEIGHT: f64 = 0.5;
/// How fast the typical error follows.
const ERROR_BLEND: f64 = 0.05;
/// An error that is more typical than this says that nothing is known; it is no reason to stop prefill.
const ERROR_MAX: f64 = 0.3;

/// What a step does, as far as it costs time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepCost {
    /// Rows.
    rows: u64,
    /// Rows of works that have several.
    prefill_rows: u64,
    /// For each of those, the tokens that it looks at.
    pairs: u64,
    /// Tokens that single rows look at.
    context: u64,
}

impl StepCost {
    /// Of a whole step.
    pub fn of(step: &Step) -> Self {
        let mut cost = Self::default();
        for work in &step.works {
            cost.add(u64::from(work.start), u64::from(work.rows()));
        }
        cost
    }

    /// Adds rows of one sequence from a position on.
    pub(crate) fn add(&mut self, start: u64, rows: u64) {
        self.rows += rows;
        if rows > 1 {
            self.prefill_rows += rows;
            self.pairs += rows * start + rows * (rows + 1) / 2;
        } else {
            self.context += rows * (start + 1);
        }
    }

    fn features(&self) -> [f64; FEATURES] {
        [1.0, self.rows as f64, self.pairs as f64, self.context as f64]
    }
}

const FEATURES: usize = 4;

/// The weights of one kind of step, and what they follow from.
#[derive(Clone, Debug, Default)]
struct Fit {
    /// Sums over steps of the products of features, and of the features, each over the step's time.
    start: Sums,
    recent: Sums,
    weights: [f64; FEATURES],
    /// Steps that it saw.
    steps: u64,
    /// Most rows that it saw in one.
    rows_max: u64,
    /// Typical relative error.
    error: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    products: [[f64; FEATURES]; FEATURES],
    features: [f64; FEATURES],
}

impl Sums {
    fn add(&mut self, features: &[f64; FEATURES], keep: f64, weight: f64) {
        for (i, row) in self.products.iter_mut().enumerate() {
            for (product, feature) in row.iter_mut().zip(features) {
                *product = *product * keep + weight * features[i] * feature;
            }
            self.features[i] = self.features[i] * keep + weight * features[i];
        }
    }

    fn plus(mut self, other: &Self) -> Self {
        for i in 0..FEATURES {
            self.features[i] += other.features[i];
            for j in 0..FEATURES {
                self.products[i][j] += other.products[i][j];
            }
        }
        self
    }
}

impl Fit {
    fn predict(&self, cost: &StepCost) -> f64 {
        cost.features()
            .iter()
            .zip(&self.weights)
            .map(|(x, w)| x * w)
            .sum()
    }

    fn learn(&mut self, cost: &StepCost, micros: f64, at_start: bool) {
        let features = cost.features().map(|feature| feature / micros);
        if at_start {
            self.start.add(&features, 1.0, START_WEIGHT);
        } else {
            let error = (self.predict(cost) / micros - 1.0).abs().min(1.0);
            self.error += ERROR_BLEND * (error - self.error);
            self.recent.add(&features, FORGET, 1.0);
        }
        self.steps += 1;
        self.rows_max = self.rows_max.max(cost.rows);
        self.weights = non_negative(&self.start.plus(&self.recent));
    }
}

/// What steps cost on one device.
#[derive(Clone, Debug, Default)]
pub struct CostModel {
    decode: Fit,
    prefill: Fit,
}

impl CostModel {
    /// A model that knows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    fn fit(&mut self, cost: &StepCost) -> &mut Fit {
        if cost.prefill_rows > 0 {
            &mut self.prefill
        } else {
            &mut self.decode
        }
    }

    /// A step of the start took so long. What is learnt so is never forgotten.
    pub fn begin_with(&mut self, cost: &StepCost, took: Micros) {
        if took.0 > 0 {
            self.fit(cost).learn(cost, took.0 as f64, true);
        }
    }

    /// A step took so long.
    pub fn learn(&mut self, cost: &StepCost, took: Micros) {
        if took.0 > 0 {
            self.fit(cost).learn(cost, took.0 as f64, false);
        }
    }

    /// How long a step will take; `None` before any step of its kind was seen.
    pub fn predict(&self, cost: &StepCost) -> Option<Micros> {
        let fit = if cost.prefill_rows > 0 {
            &self.prefill
        } else {
            &self.decode
        };
        (fit.steps > 0).then(|| Micros(fit.predict(cost).round() as u64))
    }

    /// Whether a step with prefill will end within `target`. Longer steps than twice the longest that was seen are not
    /// believed: what they cost is a guess.
    fn keeps(&self, cost: &StepCost, target: Micros) -> bool {
        let fit = &self.prefill;
        let margin = 1.0 + fit.error.min(ERROR_MAX);
        cost.rows <= 2 * fit.rows_max && fit.predict(cost) * margin <= target.0 as f64
    }
}

/// Keeps the time between tokens of a stream below a target.
#[derive(Clone, Debug)]
pub struct Pace {
    /// The longest step while a stream decodes.
    pub target: Micros,
    /// Prefill rows that a step may have whatever they cost, at least 1: else a slow device would never get through a
    /// prompt.
    pub rows_min: u32,
    /// What steps cost.
    pub costs: CostModel,
}

impl Pace {
    /// Of at most `most` rows of prefill, as many as keep the target beside `decode`; `rows_min` at least, while there are
    /// so many. `with` adds so many rows of prefill to a step, as the scheduler would share them out.
    pub(crate) fn rows(
        &self,
        decode: StepCost,
        most: usize,
        mut with: impl FnMut(StepCost, usize) -> StepCost,
    ) -> usize {
        let mut keeps = |rows| self.costs.keeps(&with(decode, rows), self.target);
        let least = self.rows_min.max(1) as usize;
        if most <= least || keeps(most) {
            return most;
        }
        let (mut good, mut bad) = (least, most);
        while bad - good > 1 {
            let middle = good.midpoint(bad);
            if keeps(middle) {
                good = middle;
            } else {
                bad = middle;
            }
        }
        good
    }
}

/// The weights of the least sum of squared relative errors, none below zero: of all choices of features, the best whose
/// weights are none below zero. So few features have few choices.
fn non_negative(sums: &Sums) -> [f64; FEATURES] {
    let mut best = ([0.0; FEATURES], 0.0);
    for chosen in 1_u32..1 << FEATURES {
        let indices: Vec<usize> = (0..FEATURES).filter(|i| chosen >> i & 1 == 1).collect();
        let Some(weights) = solve(sums, &indices) else {
            continue;
        };
        // Less the constant part. At the least point of its features this is minus the product with their sums.
        let loss = -(0..FEATURES).map(|i| weights[i] * sums.features[i]).sum::<f64>();
        if weights.iter().all(|&weight| weight >= 0.0) && loss < best.1 {
            best = (weights, loss);
        }
    }
    best.0
}

/// The best weights of these features alone; `None` if the steps so far do not tell them apart.
fn solve(sums: &Sums, indices: &[usize]) -> Option<[f64; FEATURES]> {
    /// Of a pivot, where every feature has size 1.
    const APART: f64 = 1e-9;
    let n = indices.len();
    let scale: Vec<f64> = indices.iter().map(|&i| sums.products[i][i].sqrt()).collect();
    if scale.contains(&0.0) {
        return None;
    }
    let mut rows: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            let mut row: Vec<f64> = (0..n)
                .map(|j| sums.products[indices[i]][indices[j]] / (scale[i] * scale[j]))
                .collect();
            row.push(sums.features[indices[i]] / scale[i]);
            row
        })
        .collect();
    // Positive definite: no row needs to be exchanged.
    for pivot in 0..n {
        if rows[pivot][pivot] < APART {
            return None;
        }
        let (above, below) = rows.split_at_mut(pivot + 1);
        for row in below {
            let factor = row[pivot] / above[pivot][pivot];
            for (number, of_pivot) in row.iter_mut().zip(&above[pivot]) {
                *number -= factor * of_pivot;
            }
        }
    }
    let mut weights = [0.0; FEATURES];
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n)
            .map(|j| rows[i][j] * weights[indices[j]] * scale[j])
            .sum();
        weights[indices[i]] = (rows[i][n] - known) / rows[i][i] / scale[i];
    }
    Some(weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(start: u64, rows: u64, contexts: &[u64]) -> StepCost {
        let mut cost = StepCost::default();
        cost.add(start, rows);
        contexts.iter().for_each(|&context| cost.add(context, 1));
        cost
    }

    #[test]
    fn weights_are_found_whatever_their_sizes() {
        let mut model = CostModel::new();
        let truth = |cost: &StepCost| {
            let features = cost.features();
            4000.0 + 20.0 * features[1] + 0.001 * features[2] + 0.03 * features[3]
        };
        for (start, rows) in [(0, 128), (0, 512), (3000, 512), (100, 2000), (9000, 64)] {
            for contexts in [&[][..], &[900, 1000], &[5000; 40]] {
                let cost = cost(start, rows, contexts);
                model.begin_with(&cost, Micros(truth(&cost) as u64));
            }
        }
        let unseen = cost(5000, 1000, &[2000; 20]);
        let predicted = model.predict(&unseen).expect("known").0 as f64;
        assert!(
            (predicted / truth(&unseen) - 1.0).abs() < 1e-3,
            "{predicted} for {}",
            truth(&unseen)
        );
        assert_eq!(
            model.predict(&cost(5, 1, &[])),
            None,
            "no step without prefill was seen"
        );
    }

    #[test]
    fn no_weight_is_negative_and_what_is_not_told_apart_has_none() {
        let mut model = CostModel::new();
        // Longer steps take less time, and every step looks the same otherwise.
        for (rows, micros) in [(100, 5000), (200, 4000), (300, 3000)] {
            model.learn(&cost(0, rows, &[]), Micros(micros));
        }
        assert!(
            model.prefill.weights.iter().all(|&weight| weight >= 0.0),
            "{model:?}"
        );
        let mut same = CostModel::new();
        for _ in 0..3 {
            same.learn(&cost(0, 100, &[]), Micros(5000));
        }
        let predicted = same.predict(&cost(0, 100, &[])).expect("seen").0;
        assert!((4990..=5010).contains(&predicted), "{predicted}");
    }

    #[test]
    fn a_change_is_followed_and_the_start_is_not_forgotten() {
        let mut model = CostModel::new();
        for rows in [128, 512, 2048] {
            model.begin_with(&cost(0, rows, &[]), Micros(1000 + 20 * rows));
        }
        for _ in 0..300 {
            model.learn(&cost(0, 500, &[]), Micros(22_000)); // Twice what it was.
        }
        let near = model.predict(&cost(0, 500, &[])).expect("seen").0;
        assert!((20_500..=22_500).contains(&near), "{near}");
        let far = model.predict(&cost(0, 2000, &[])).expect("seen").0;
        assert!(far > 60_000, "rows still cost something each: {far}");
    }
}
