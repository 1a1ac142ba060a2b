//! The bugs of `tests/mutants`: that each still applies, and is built behind a question of its own.
//!
//! A patch is a text that says what the bug is, a blank line, for the bug of a state machine the
//! lines `Of:` (a file and a type with an `assert_state`) and `Fires:` (a text of that assertion),
//! and a unified diff. `scripts/mutants --patches` builds and tries them; here only text is read.

/// A piece of a diff: the file, and its lines before the change.
struct Hunk {
    file: String,
    before: String,
}

fn hunks(patch: &str) -> Vec<Hunk> {
    let mut hunks: Vec<Hunk> = Vec::new();
    let mut file = "";
    for line in patch.lines() {
        if let Some(name) = line.strip_prefix("--- a/") {
            file = name;
        } else if line.starts_with("@@ ") {
            hunks.push(Hunk { file: file.to_owned(), before: String::new() });
        } else if let (Some(hunk), Some(' ' | '-')) = (hunks.last_mut(), line.chars().next()) {
            hunk.before += &line[1..];
            hunk.before.push('\n');
        }
    }
    hunks
}

fn field<'a>(patch: &'a str, name: &str) -> Option<&'a str> {
    patch.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// What is wrong with a patch of this name; `text_of` gives the text of a file.
pub fn complaints(
    name: &str,
    patch: &str,
    text_of: impl Fn(&str) -> Option<String>,
) -> Vec<String> {
    let bug = name.rsplit('/').next().unwrap().trim_end_matches(".patch");
    let mut complaints = Vec::new();
    let mut complain = |what: String| complaints.push(format!("{name}: {what}"));
    if !patch.contains(&format!("crate::patched(\"{bug}\")")) {
        complain(format!("asks nowhere for crate::patched(\"{bug}\")"));
    }
    let hunks = hunks(patch);
    if hunks.is_empty() {
        complain("changes nothing".into());
    }
    for hunk in hunks {
        let found = text_of(&hunk.file).map(|text| text.matches(&hunk.before).count());
        if found != Some(1) {
            complain(format!(
                "does not apply any more: {} has these lines {} times:\n{}",
                hunk.file,
                found.unwrap_or(0),
                hunk.before
            ));
        }
    }
    match (field(patch, "Of"), field(patch, "Fires")) {
        (Some(of), Some(fires)) => {
            let (file, owner) = of.split_once(' ').unwrap_or((of, ""));
            let text = text_of(file).unwrap_or_default();
            let own = text.split(&format!("\nimpl {owner} {{")).nth(1).unwrap_or("");
            if !own.split("\nimpl ").next().unwrap().contains("fn assert_state(") {
                complain(format!("{of} has no assert_state"));
            }
            if !text.contains(fires) {
                complain(format!("no assertion of {file} says `{fires}`"));
            }
        }
        (None, None) => {}
        _ => complain("has one of `Of:` and `Fires:`, and needs both or none".into()),
    }
    complaints
}
