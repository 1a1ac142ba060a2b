//! Records of benchmarks (`benches/record`), and the README's figures, which come from them.
//!
//! If these fail, a figure in the README can't be traced to the run that gave it: to a machine, a
//! commit and options with which it could be repeated.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const RECORDS: &str = "benches/record/";
/// How the README says that a figure has no record.
const BEFORE_RECORDS: &str = "before records were kept";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn records() -> Vec<PathBuf> {
    let entries = |dir: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        entries.map(|entry| entry.expect("an entry").path()).collect()
    };
    entries(&root().join(RECORDS)).iter().flat_map(|machine| entries(machine)).collect()
}

/// What is wrong with a record named `file`.
fn complaints(file: &str, text: &str) -> Vec<String> {
    let record: Value = match serde_json::from_str(text) {
        Ok(record) => record,
        Err(error) => return vec![format!("{file}: {error}")],
    };
    let is_text = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
    let mut wrong = Vec::new();
    let mut must = |holds: bool, what: &str| {
        if !holds {
            wrong.push(format!("{file}: {what}"));
        }
    };
    for field in ["bench", "date", "commit", "rustc", "load"] {
        must(is_text(&record[field]), &format!("`{field}` is missing"));
    }
    must(record["options"].is_string(), "`options` are missing");
    let commit = record["commit"].as_str().unwrap_or_default();
    must(commit.len() >= 7, "the commit can't be told");
    let machine = &record["machine"];
    must(is_text(&machine["processor"]) && is_text(&machine["kernel"]), "the machine is not named");
    must(machine["cores"].as_u64() > Some(0), "cores are not counted");
    let text = |field: &str| record[field].as_str().unwrap_or_default().to_owned();
    let name = format!("{}-{}.json", text("date"), text("bench"));
    must(file.ends_with(&name), &format!("its name should be {name}"));
    let rows = record["rows"].as_array().map_or(&[][..], Vec::as_slice);
    must(!rows.is_empty(), "it has no rows");
    for row in rows {
        let is_whole = is_text(&row["name"])
            && is_text(&row["unit"])
            && row["median"].as_f64().is_some_and(f64::is_finite)
            && row["runs"].as_u64() > Some(0)
            && (row["reference"].is_null()
                || row["reference"].is_f64()
                || row["reference"].is_u64());
        must(is_whole, &format!("a row lacks name, unit, median or runs: {row}"));
    }
    wrong
}

#[test]
fn each_record_says_where_its_figures_come_from() {
    let records = records();
    assert!(!records.is_empty(), "there are no records");
    let wrong: Vec<String> = records
        .iter()
        .flat_map(|path| {
            let text = std::fs::read_to_string(path).expect("a record can be read");
            complaints(&path.display().to_string(), &text)
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_record_without_its_machine_or_with_half_a_row_is_noticed() {
    let whole = r#"{"bench": "b", "date": "2026-01-02", "commit": "0123456", "rustc": "1", "load": "0",
        "options": "", "machine": {"processor": "p", "cores": 2, "memory_gib": 4, "kernel": "Linux 6"},
        "rows": [{"name": "n", "unit": "us", "median": 1.5, "runs": 3}]}"#;
    let file = "2026-01-02-b.json";
    assert_eq!(complaints(file, whole), Vec::<String>::new());
    assert!(!complaints("2026-01-03-b.json", whole).is_empty(), "another day");
    for part in [r#""kernel": "Linux 6""#, r#""runs": 3"#, r#""commit": "0123456","#, "1.5"] {
        assert!(!complaints(file, &whole.replace(part, "")).is_empty(), "without {part}");
    }
}

/// The paragraphs and tables of the README's section on results; a table belongs to the paragraph
/// above it.
fn results(readme: &str) -> Vec<String> {
    let section = readme.split("\n## Results\n").nth(1).expect("a section on results");
    let section = section.split("\n## ").next().expect("its text");
    let mut blocks: Vec<String> = Vec::new();
    for block in section.split("\n\n").map(str::trim).filter(|block| !block.is_empty()) {
        match blocks.last_mut() {
            Some(last) if block.starts_with('|') => *last += &format!("\n\n{block}"),
            _ => blocks.push(block.to_owned()),
        }
    }
    blocks
}

/// The records that a text links to.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets.filter(|target| target.starts_with(RECORDS)).collect()
}

/// Blocks with figures that name no record, and rows of their tables that are not, or not so, in
/// the records that their block names.
fn unrecorded(readme: &str, record: impl Fn(&str) -> Option<Value>) -> Vec<String> {
    let mut wrong = Vec::new();
    for block in results(readme) {
        let has_figures = block.bytes().any(|byte| byte.is_ascii_digit());
        let links = links(&block);
        if has_figures && links.is_empty() && !block.contains(BEFORE_RECORDS) {
            wrong.push(format!("no record is named for: {block}"));
        }
        let mut medians = BTreeMap::new();
        for link in links {
            match record(link) {
                Some(record) => medians.extend(medians_of(&record)),
                None => wrong.push(format!("there is no {link}")),
            }
        }
        if medians.is_empty() {
            continue;
        }
        // After the heads of the columns and the line below them.
        for line in block.lines().filter(|line| line.starts_with('|')).skip(2) {
            let mut cells = line.trim_matches('|').split('|').map(str::trim);
            let (name, figure) = (cells.next().unwrap_or(""), cells.next().unwrap_or(""));
            let recorded = medians.get(name.trim_matches('`'));
            // `9,917` and `12.5 k/s`.
            let number = figure.split(' ').next().unwrap_or_default().replace(',', "");
            let decimals = number.split('.').nth(1).map_or(0, str::len);
            if recorded.is_none_or(|median| number != format!("{median:.decimals$}")) {
                wrong.push(format!("{name}: {figure} in the README, recorded: {recorded:?}"));
            }
        }
    }
    wrong
}

fn medians_of(record: &Value) -> Vec<(String, f64)> {
    let rows = record["rows"].as_array().map_or(&[][..], Vec::as_slice);
    let median = |row: &Value| Some((row["name"].as_str()?.to_owned(), row["median"].as_f64()?));
    rows.iter().filter_map(median).collect()
}

#[test]
fn the_readmes_figures_are_those_of_the_records_that_it_names() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("the README");
    let record =
        |path: &str| serde_json::from_str(&std::fs::read_to_string(root().join(path)).ok()?).ok();
    let wrong = unrecorded(&readme, record);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_figure_without_a_record_or_with_another_one_is_noticed() {
    let record = serde_json::json!({"rows": [{"name": "put", "median": 9917.4}]});
    let found = |text: &str| {
        let readme = format!("# x\n\n## Results\n\n{text}\n\n## Limits\n\n1 of 2\n");
        unrecorded(&readme, |path| path.ends_with("/1.json").then(|| record.clone())).len()
    };
    let link = "[record](benches/record/m/1.json)";
    assert_eq!(found("No figures here."), 0);
    assert_eq!(found("It takes 5 s."), 1);
    assert_eq!(found(&format!("It takes 5 s ({BEFORE_RECORDS}: abc).")), 0);
    assert_eq!(found("As [here](benches/record/m/2.json)."), 1);
    for (figure, wrong) in [("9,917", 0), ("9917.4", 0), ("9,918", 1), ("", 1)] {
        let table = format!("| Work | |\n|---|---|\n| `put` | {figure} |");
        assert_eq!(found(&format!("All ({link}).\n\n{table}")), wrong, "{figure}");
    }
    let table = "| Work | |\n|---|---|\n| get | 1 |";
    assert_eq!(found(&format!("All ({link}).\n\n{table}")), 1, "a row that is not recorded");
}
