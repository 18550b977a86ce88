//! Config files: any text is a config or a list of errors that name a line of it.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use rfsis_agent::config;

fuzz_target!(|text: &str| {
    match config::parse(text, Path::new("/nonexistent/config.yaml")) {
        Ok(config) => {
            let heartbeat = &config.heartbeat;
            assert!(heartbeat.lease < heartbeat.takeover_time());
            assert!(!config.services.is_empty());
            assert_ne!(config.nodes[0], config.nodes[1]);
        }
        Err(errors) => {
            assert!(!errors.0.is_empty());
            // YAML 1.1 section 5.4: each of them ends a line.
            let lines = text
                .matches(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}'])
                .count()
                + 1;
            for error in &errors.0 {
                let line = error.line.expect("a text has lines");
                assert!((1..=lines + 1).contains(&line), "{error}");
            }
        }
    }
});
