use super::super::features::of_table;
use super::*;
use crate::domain::DataType;
use crate::drift::feature::of_rows;

fn table(folder: &tempfile::TempDir, text: &str) -> Table {
    let path = folder.path().join("rows.csv");
    std::fs::write(&path, text).unwrap();
    Table::open(&path, None).unwrap()
}

fn read(features: &[Feature], table: &Table) -> Result<Vec<String>, Stop> {
    let binding = Binding::new(features, table)?;
    let mut found = Vec::new();
    binding.read(table, |number, value| {
        let value = match value {
            Value::Number(number) => number.to_string(),
            Value::Text(text) => String::from_utf8_lossy(text).into_owned(),
            _ => "missing".to_owned(),
        };
        found.push(format!("{} {value}", features[number].label()));
    })?;
    found.extend(binding.notes(features, &[]));
    Ok(found)
}

#[test]
fn columns_are_found_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut features = of_rows(Role::Input, "x", DataType::Fp32, Some(&[2]));
    features.extend(of_rows(Role::Output, "y", DataType::Fp32, Some(&[2])));
    let table = table(&folder, "when,x[1],out_y[0],y[1],x[0]\nnow,2,0.25,0.75,\n");
    let found = read(&features, &table).unwrap();
    let want = [
        "in x[1] 2",
        "out y[0] 0.25",
        "out y[1] 0.75",
        "in x[0] missing",
        "out class(y) 1",
        "out confidence(y) 0.75",
        "out margin(y) 0.5",
    ];
    assert_eq!(found[..7], want);
    let wrong = super::super::Table::open(&folder.path().join("none.csv"), None);
    assert!(matches!(wrong, Err(Stop::Usage(_))));
}

#[test]
fn a_single_matrix_takes_columns_in_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let features = of_rows(Role::Input, "x", DataType::Fp32, Some(&[2]));
    let rows = table(&folder, "height,width\n1,2\n");
    let found = read(&features, &rows).unwrap();
    assert_eq!(found[..2], ["in x[0] 1", "in x[1] 2"]);
    assert!(found[2].contains("in their order"), "{found:?}");
    // Another number of columns is another table.
    let rows = table(&folder, "height,width,depth\n1,2,3\n");
    let Err(Stop::Usage(problem)) = read(&features, &rows) else { panic!("bound") };
    assert!(problem.contains("x[0], x[1]"), "{problem}");
}

#[test]
fn a_table_without_a_model_has_features_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let rows = table(&folder, "a,b[0],b[2],c\n1,2,3,red\n");
    let names: Vec<String> =
        of_table(&rows).unwrap().into_iter().map(|feature| feature.name).collect();
    assert_eq!(names, ["a", "c", "b[0]", "b[1]", "b[2]"]);
}
