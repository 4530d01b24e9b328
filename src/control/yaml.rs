//! YAML that others wrote: `MLmodel`, `.dvc`, `dvc.lock`.
//!
//! Invariant: a text costs no more than a small multiple of its length; aliases do not multiply it.

use serde::de::DeserializeOwned;

/// Most values in one text: `dvc.lock` has a few for each file of a pipeline.
const NODES_MAX: usize = 50_000;
/// Deepest nesting: `MLmodel` has four levels.
const DEPTH_MAX: usize = 32;
/// None of these files refers to itself.
const ALIASES_MAX: usize = 64;

/// Reads one document.
///
/// # Errors
/// What is wrong with it, on one line.
pub(super) fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: NODES_MAX,
            max_depth: DEPTH_MAX,
            max_aliases: ALIASES_MAX,
            max_documents: 1,
        },
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        line.chars().take(200).filter(|char| !char.is_control()).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bombs_are_refused() {
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for at in 1..12 {
            let before = format!("*a{}, ", at - 1).repeat(10);
            bomb.push_str(&format!("a{at}: &a{at} [{before}]\n"));
        }
        assert!(parse::<serde_json::Value>(&bomb).is_err());
        assert!(parse::<serde_json::Value>(&"[".repeat(10_000)).is_err());
        let good: serde_json::Value = parse("a: 1\nb: [x]").unwrap();
        assert_eq!(good["b"][0], "x");
    }
}
