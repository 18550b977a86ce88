//! Plain-text tables and durations for people.

use std::time::Duration;

/// Median, least and greatest of some durations.
///
/// # Panics
/// When there are none.
pub fn spread(durations: &[Duration]) -> (Duration, Duration, Duration) {
    assert!(!durations.is_empty(), "no durations to summarise");
    let mut sorted = durations.to_vec();
    sorted.sort_unstable();
    (
        sorted[sorted.len() / 2],
        sorted[0],
        sorted[sorted.len() - 1],
    )
}

/// Milliseconds with one decimal: `31.4 ms`.
pub fn millis(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

/// Median; of an even number of values the upper one.
///
/// # Panics
/// When there are none.
pub fn median(values: &[f64]) -> f64 {
    assert!(!values.is_empty(), "no values to summarise");
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// `median (least–greatest)`, two decimals, and the unit.
///
/// # Panics
/// When there are none.
pub fn range(values: &[f64], unit: &str) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let median = median(values);
    format!("{median:.2} ({least:.2}–{greatest:.2}){unit}")
}

/// A measured figure, and what it should be. Displayed as `=> what | measured | target | met?`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figure {
    what: String,
    measured: String,
    /// The target and whether it is met.
    target: Option<(String, bool)>,
}

impl Figure {
    /// A figure that should be no greater than `target`.
    pub fn at_most<T: PartialOrd>(
        what: impl Into<String>,
        measured: T,
        target: T,
        print: impl Fn(T) -> String,
    ) -> Self {
        let met = measured <= target;
        Self {
            what: what.into(),
            measured: print(measured),
            target: Some((format!("≤ {}", print(target)), met)),
        }
    }

    /// A figure that should be no less than `target`.
    pub fn at_least<T: PartialOrd>(
        what: impl Into<String>,
        measured: T,
        target: T,
        print: impl Fn(T) -> String,
    ) -> Self {
        let met = measured >= target;
        Self {
            what: what.into(),
            measured: print(measured),
            target: Some((format!("≥ {}", print(target)), met)),
        }
    }

    /// A figure without a target.
    pub fn told(what: impl Into<String>, measured: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            measured: measured.into(),
            target: None,
        }
    }
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (target, met) = match &self.target {
            Some((target, true)) => (&**target, "yes"),
            Some((target, false)) => (&**target, "**no**"),
            None => ("–", "–"),
        };
        let Self { what, measured, .. } = self;
        write!(f, "=> {what} | {measured} | {target} | {met}")
    }
}

/// A row of a [`table`].
pub fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// Rows as a Markdown table with aligned columns; the first row is the head.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |row: &Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter()
                .map(|row| cell(row, column).chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (column, &width) in widths.iter().enumerate() {
            text += &format!("| {:width$} ", cell(row, column));
        }
        text += "|\n";
        if number == 0 {
            for &width in &widths {
                text += &format!("|{}", "-".repeat(width + 2));
            }
            text += "|\n";
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_is_median_least_greatest() {
        let [one, five, nine] = [1, 5, 9].map(Duration::from_millis);
        assert_eq!(spread(&[five, one, nine]), (five, one, nine));
    }

    #[test]
    fn the_median_heeds_order_and_not_place() {
        assert_eq!(median(&[5.0, 1.0, 9.0]), 5.0);
        assert_eq!(median(&[2.0]), 2.0);
    }

    #[test]
    fn a_range_is_median_least_greatest() {
        assert_eq!(range(&[5.0, 1.0, 9.25], " s"), "5.00 (1.00–9.25) s");
    }

    #[test]
    fn a_figure_says_whether_it_meets_its_target() {
        let figure = |measured| Figure::at_most("size", measured, 16, |n| format!("{n} KiB"));
        assert_eq!(figure(16).to_string(), "=> size | 16 KiB | ≤ 16 KiB | yes");
        assert_eq!(
            figure(17).to_string(),
            "=> size | 17 KiB | ≤ 16 KiB | **no**"
        );
        let rate = |measured| Figure::at_least("rate", measured, 7, |n| n.to_string());
        assert_eq!(rate(7).to_string(), "=> rate | 7 | ≥ 7 | yes");
        assert_eq!(rate(6).to_string(), "=> rate | 6 | ≥ 7 | **no**");
        let told = Figure::told("size", "17 KiB");
        assert_eq!(told.to_string(), "=> size | 17 KiB | – | –");
    }

    #[test]
    fn a_table_aligns_its_columns() {
        let rows = [
            vec!["a".into(), "long".into()],
            vec!["wide".into(), "b".into()],
        ];
        assert_eq!(
            table(&rows),
            "| a    | long |\n|------|------|\n| wide | b    |\n"
        );
    }
}
