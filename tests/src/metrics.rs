//! A scrape of `/metrics`, taken apart.

use std::collections::BTreeMap;

/// Samples of one scrape: `name{label="value",…}` as printed, and the value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    /// Parses the text exposition format. Lines that are no sample are left out.
    pub fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        Self(
            samples
                .filter_map(|line| {
                    let (series, value) = line.rsplit_once(' ')?;
                    Some((series.to_owned(), value.parse().ok()?))
                })
                .collect(),
        )
    }

    /// Sum of all series of `name` that carry every one of `labels`; 0 if there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let wanted: Vec<String> = labels
            .iter()
            .map(|(label, value)| format!("{label}=\"{value}\""))
            .collect();
        self.0
            .iter()
            .filter(|(series, _)| {
                let (base, rest) = series.split_once('{').unwrap_or((series, ""));
                let found: Vec<&str> = rest.trim_end_matches('}').split(',').collect();
                base == name && wanted.iter().all(|label| found.contains(&label.as_str()))
            })
            .map(|(_, value)| value)
            .sum()
    }

    /// Whether there is any series of `name`.
    pub fn has(&self, name: &str) -> bool {
        self.0
            .keys()
            .any(|series| series.split('{').next() == Some(name))
    }

    /// Series whose value differs from `before`, with both values; what is new counts from 0.
    pub fn changed_since(&self, before: &Metrics) -> Vec<(String, f64, f64)> {
        self.0
            .iter()
            .map(|(series, &value)| (series.clone(), *before.0.get(series).unwrap_or(&0.0), value))
            .filter(|(_, before, after)| before != after)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRAPE: &str = "# TYPE rfsis_epoch gauge\nrfsis_epoch 2\n\
        rfsis_heartbeats_total{direction=\"received\",result=\"ok\"} 7\n\
        rfsis_heartbeats_total{direction=\"sent\",result=\"ok\"} 5\n\
        rfsis_heartbeats_total{direction=\"received\",result=\"bad_mac\"} 1\n";

    #[test]
    fn sums_pick_series_by_name_and_labels() {
        let metrics = Metrics::parse(SCRAPE);
        assert_eq!(metrics.sum("rfsis_epoch", &[]), 2.0);
        assert_eq!(
            metrics.sum("rfsis_heartbeats_total", &[("result", "ok")]),
            12.0
        );
        let received = [("result", "ok"), ("direction", "received")];
        assert_eq!(metrics.sum("rfsis_heartbeats_total", &received), 7.0);
        assert!(metrics.has("rfsis_epoch") && !metrics.has("rfsis_epo"));
    }

    #[test]
    fn changes_name_both_values() {
        let before = Metrics::parse("rfsis_epoch 1\nrfsis_same 4\n");
        let after = Metrics::parse("rfsis_epoch 2\nrfsis_same 4\nrfsis_new 1\n");
        assert_eq!(
            after.changed_since(&before),
            [
                ("rfsis_epoch".into(), 1.0, 2.0),
                ("rfsis_new".into(), 0.0, 1.0)
            ]
        );
    }
}
