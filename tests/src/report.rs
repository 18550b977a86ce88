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
