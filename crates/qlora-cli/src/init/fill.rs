//! Values into the commented template.

use burn_qlora::config::TEMPLATE;

/// The template with values in place of defaults; `values` are keys, as `section.key`, with what TOML writes behind them. A key that the template
/// does not have is put at the end of its section.
pub fn fill(values: &[(String, String)]) -> String {
    let mut lines: Vec<String> = TEMPLATE.lines().map(str::to_owned).collect();
    for (key, value) in values {
        let (section, leaf) = key.split_once('.').unwrap_or(("", key));
        let first = match section {
            "" => 0,
            section => lines.iter().position(|line| *line == format!("[{section}]")).map_or(lines.len(), |at| at + 1),
        };
        let end = lines[first..].iter().position(|line| line.starts_with('[') && line.ends_with(']'));
        let end = end.map_or(lines.len(), |at| first + at);
        let is_key = |line: &String| {
            let line = line.strip_prefix("# ").unwrap_or(line);
            line.strip_prefix(leaf).is_some_and(|rest| rest.starts_with(" = "))
        };
        let line = format!("{leaf} = {value}");
        match lines[first..end].iter().position(is_key) {
            Some(at) => lines[first + at] = line,
            None => lines.insert(end, line),
        }
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_qlora::TrainConfig;

    #[test]
    fn values_stand_where_the_template_has_them() {
        let values =
            [("model.path", "\"a/b\""), ("data.train", "[\"c\"]"), ("train.max_steps", "7"), ("device", "\"cpu\"")];
        let text = fill(&values.map(|(key, value)| (key.to_owned(), value.to_owned())));
        assert_eq!(text.lines().count(), TEMPLATE.lines().count());
        let config = TrainConfig::parse(&text, "filled").unwrap();
        assert_eq!(
            (config.model.path.as_str(), config.train.max_steps, config.device.as_str()),
            ("a/b", Some(7), "cpu")
        );
        assert_eq!(config.data.train.to_string(), "c");
        assert!(text.contains("# Required. A folder with a Hugging Face checkpoint"), "comments stay");
    }
}
